"""`ft recipes`: what is shipped, a start for one's own, and the schema for editors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from finetune.data.samples import kind_of
from finetune.errors import UserError, visible
from finetune.language import translated
from finetune.places import check_file, json_with
from finetune.recipe import reference
from finetune.recipe.file import schema
from finetune.recipe.importing.source import read
from finetune.recipe.importing.translate import translate
from finetune.recipe.reading import find, shipped
from finetune.recipe.stages import RECIPES
from finetune.run import json_option
from finetune.run.writing import write_atomically
from finetune.terminal.progress import command, note, say, say_json, tell, warn

TEMPLATE = """\
# ft {stage} --recipe {path}
# $schema: {schema}
version: 1
stage: {stage}
model: {{name: {model}}}
{body}
output: {{dir: {output}}}
"""
LORA = "adapter: {{method: lora, r: 16, lora_alpha: 32}}"
HELD_OUT = ("data: {{train: {data}, eval_split: 0.05, max_length: 2048}}", LORA)
PROMPTS = ("data: {{train: {data}, max_length: 1024}}", LORA)
TRAIN = "train: {{{{learning_rate: {}, num_train_epochs: {}, effective_batch_size: 16}}}}"
PPO = (
    "ppo: {{max_new_tokens: 64, kl_coef: 0.05, num_mini_batches: 4, cliprange_value: 1.0}}",
    "train: {{learning_rate: 5.0e-5, max_steps: 100, effective_batch_size: 64}}",
)
BODIES = {
    "pretrain": ("data: {{train: {data}, max_length: 512}}", TRAIN.format("5.0e-5", 1)),
    "sft": (*HELD_OUT, TRAIN.format("2.0e-4", 3)),
    "reward": (*HELD_OUT, TRAIN.format("1.0e-4", 1)),
    "dpo": (*HELD_OUT, "dpo: {{loss_type: sigmoid, beta: 0.1, sft_weight: 0.2}}", TRAIN.format("5.0e-5", 1)),
    "kto": (*HELD_OUT, "kto: {{beta: 0.1}}", TRAIN.format("5.0e-5", 1)),
    "ppo": (
        *PROMPTS,
        "# pairs, of which a reward model is trained first; or model: a run of ft reward, or functions: [file.py:name]",
        "reward: {{train: {data}, learning_rate: 1.0e-4, num_train_epochs: 1}}", *PPO,
    ),
    "ppo by rule": (
        *PROMPTS,
        "# a file of yours, as docs/ppo.md shows; or model: a run of ft reward, or train: preference pairs",
        "reward: {{functions: [rules.py:score]}}", *PPO,
    ),
}  # fmt: skip
"""stage -> the sections that are its own. Among real pairs many a question alone has 1,024 tokens."""
STAGE_OF = {"sft": "sft", "preference": "dpo", "unpaired": "kto", "text": "pretrain"}
"""kind of rows -> the stage a recipe for them is for, unless another is asked for."""
SCHEMA_FILE = "ft-recipe.schema.json"


def show_all(json_file: str | None = None) -> None:
    """Every shipped recipe with what it needs: those for built-in bases first, then those that download theirs."""
    json_option.check(json_file, "recipes")
    groups: dict[str, list[str]] = {"": []}
    rows = []
    for name, path in shipped().items():
        text = path.read_text(encoding="utf-8")
        run_with, _, needs = text.splitlines()[0].lstrip("# ").partition("  ")
        values = yaml.safe_load(text)
        model = str(values["model"]["name"])
        download = "" if "/" not in model else f"these download {model} first"
        groups.setdefault(download, []).append(f"{name:30} {needs.strip() or run_with}")
        more = {"model": model, "download": bool(download), "command": run_with, "needs": needs.strip() or None}
        rows.append({"name": name, "stage": values["stage"], **more, "path": str(path)})
    json_option.write(json_file, {"recipes": rows})
    if json_file is not None:
        return
    for download, lines in groups.items():
        say(f"\n{translated(download)}:" if download else translated("on built-in bases, without a download:"))
        say("\n".join(lines))
    say("")
    tell("ft recipes show NAME prints one; --set model.name=tiny-llama runs any of them on a built-in base")


def show(name: str) -> None:
    say(find(name).read_text(encoding="utf-8"), end="")


def explain(key: str | None, *, markdown: bool = False, json_file: str | None = None) -> None:
    """A key or a section in words; all of them without a name."""
    json_option.check(json_file, "keys")
    if json_file is not None:
        json_option.write(json_file, {"keys": reference.as_json(key)})
    elif markdown:
        say(reference.document(), end="")
    else:
        say("\n".join(reference.explain(key)))


def show_schema() -> None:
    say_json(schema())


def import_file(path: str, output: str | None = None) -> None:
    """Another tool's config or command line as a recipe, to stdout or into a new file. What has no equivalent here is
    listed with the reason, also at the recipe's end."""
    source = read(Path(path).expanduser())
    target = None if output is None else Path(output).expanduser()
    if target is not None:
        check_file(target, "--output", lambda _: False)
    found = translate(source)
    name = target.name if target is not None else "RECIPE.yaml"
    head = f"# ft {found.stage} --recipe {name}\n# imported from {source.path.name} of {source.tool}\n"
    left = [f"{theirs}: {shown_value(value)} ({why})" for theirs, value, why in found.left_out]
    body = yaml.safe_dump(found.values, sort_keys=False, allow_unicode=True)
    listed = [*(["", "Look at:", *found.notes] if found.notes else []), *(["", "Left out:", *left] if left else [])]
    foot = "".join(f"# {line}".rstrip() + "\n" for line in listed)
    if target is None:
        say(head + body + foot, end="")
        return
    write_atomically(target, visible(head + body + foot))
    for line in left:
        note(f"left out: {line}")
    for line in found.notes:
        warn(line)
    note(f"wrote {target}; now run {command(found.stage, '--recipe', target, '--dry-run')}")


def shown_value(value: object) -> str:
    """In one line, not too long."""
    text = " ".join(json.dumps(value, ensure_ascii=False, default=str).split())
    return text if len(text) <= 60 else text[:59] + "…"


def quoted(text: str) -> str:
    """`text` as it stands in YAML, in quotes where it needs them."""
    return yaml.safe_dump([text], default_flow_style=True, allow_unicode=True, width=2**16).strip()[1:-1]


def new(path: str, *, stage: str | None = None, model: str = "tiny-llama", data: str = "data/train.jsonl") -> None:
    """Write a recipe and the schema beside it; an existing file is never replaced. Without a stage the rows tell it."""
    target = Path(path)
    if os.path.lexists(target):
        raise UserError("exists already", path=target, fix="choose another name")
    if stage is not None and stage not in RECIPES:
        raise UserError(f"unknown stage {stage!r}", key="--stage", fix=f"one of {', '.join(RECIPES)}")
    kind = kind_of(data)
    stage = stage or STAGE_OF[kind or "sft"]
    beside = target.parent / SCHEMA_FILE
    check_file(target, "PATH", lambda _: False)
    check_file(beside, "PATH", json_with("$schema", "$defs"))
    body = "\n".join(BODIES["ppo by rule" if stage == "ppo" and kind == "sft" else stage]).format(data=quoted(data))
    output = quoted(f"runs/{target.stem}")
    text = TEMPLATE.format(stage=stage, path=path, model=quoted(model), body=body, output=output, schema=SCHEMA_FILE)
    write_atomically(target, text)
    write_atomically(beside, json.dumps(schema(), ensure_ascii=False, indent=2))
    tell(f"wrote {target} and {beside}; now run {command(stage, '--recipe', target, '--dry-run')}")
