"""`ft export`: an adapter as another program loads it, with the command that does; or what keeps that program from it.

Nothing is written before every limit is known, and what is written computes what the adapter computed.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from finetune import places
from finetune.adapters import combine, consumers
from finetune.adapters.uniform import deltas, uniform
from finetune.base import Base
from finetune.data import thinking
from finetune.early.merging import EXPORT, check_apart, check_target, started_by, written_names
from finetune.errors import RunError, UserError
from finetune.models import adapter_files, attach, sources, tokenizers
from finetune.models.adapter_files import described
from finetune.models.gguf.adapter import write_adapter
from finetune.models.gguf.export import portable
from finetune.models.gguf.header import begins_by_itself
from finetune.models.gguf.places import model_name
from finetune.models.identity import IDENTITY_FILE, check_identity, configs_of, read_identity
from finetune.models.weight_files import tensors
from finetune.run.directory import versions
from finetune.run.writing import write_atomically, write_json
from finetune.serving import modelfiles
from finetune.terminal.progress import command, note, shown_name, warn
from finetune.training import model_card

EXACT = 1e-6
"""What the export of a layer may miss, of its size: one rounding to float32."""
GGUF_FILE = "adapter.gguf"
TEMPLATE_FILE = "chat_template.jinja"
BASE_FILE = "BASE.gguf"


@dataclass(frozen=True)
class Job:
    adapter: Path
    base: Base
    consumer: str
    stored: dict[str, Any]
    """adapter_config.json"""

    @property
    def place(self) -> str:
        """The base, as another program is told of it."""
        name = self.base.model.name
        here = self.made_here or Path(name).expanduser().exists()
        return str(self.base.folder) if here else name

    @property
    def made_here(self) -> bool:
        """Whether nobody else has the base's folder by its name: it comes with this package, or is made of a file."""
        return self.base.model.name in sources.known_names() or sources.is_gguf_base(self.base.model)

    @property
    def own_template(self) -> bool:
        """Whether the adapter was trained in another chat format than its base has."""
        return bool(self.base.tokenizer.chat_template != tokenizers.load_tokenizer(self.base.model).chat_template)


def run(adapter: str, consumer: str, output: str, *, model: str | None = None, overwrite: bool = False) -> None:
    target = Path(output).expanduser()
    check_target(target, overwrite, EXPORT)
    job = opened(adapter, consumer, target, model)
    write = {"llama.cpp": write_llama_cpp, "ollama": write_ollama}.get(consumer, write_peft)
    with places.built_beside(target, "--output", lambda: written_names(target, overwrite, EXPORT)) as part:
        said = write(job, part, target)
        files = sorted({path.name for path in part.iterdir()} - {places.UNFINISHED} | {EXPORT})
        report = {"adapter": str(job.adapter), "for": consumer, "base": job.base.model.name, "versions": versions()}
        write_json(part / EXPORT, {**report, "files": files})
    note(f"exported for {consumers.consumer(consumer).what}: {target}")
    for line in said:
        note(line)
    for line in differences(job):
        warn(line)


def differences(job: Job) -> list[str]:
    """What is otherwise there than where the adapter was trained."""
    said, marks = [], job.base.encoder.thinking
    if kind := read_identity(job.adapter).get("quantization"):
        said.append(f"it was trained on {kind} weights: on the original ones its answers may differ a little")
    # The Modelfile asks as was trained.
    if job.consumer != "ollama" and (found := thinking.mismatch(job.base.trained, None, marks)):
        how = f"{marks.switch}: {str(thinking.usual(job.base.trained)).lower()}"
        said.append(f"by the chat template's default {found}: ask with {how}")
    return said


def opened(adapter: str, consumer: str, target: Path, model: str | None) -> Job:
    """UserError, before anything is loaded or written, for what the consumer would not take."""
    folder = sources.adapter_folder(adapter)
    config, _ = configs_of(folder, model)
    check_apart(target, folder, sources.folder(config), done="exported")
    stored = described(folder)
    consumers.check(consumer, stored, folder, started_by(folder))
    base = Base.open(config, folder)
    model_type = str(base.config["model_type"])
    consumers.check_base(consumer, model_type, folder)
    consumers.check_names(consumer, sorted(adapter_files.shapes(folder)), model_type, folder)
    check_identity(folder, base.folder, config.name)
    if config.rope_scaling is not None and config.rope_scaling.rope_type != "default":
        what = f"was trained with model.rope_scaling ({config.rope_scaling.rope_type}), which its base alone has not"
        raise UserError(what, path=folder, key="--for", fix=consumers.MERGE)
    if consumer == "ollama" and not sources.is_gguf_base(config):
        raise UserError(
            "Ollama puts an adapter on a GGUF base, and its base is none", path=folder, key="--for",
            fix="merge it: ft merge --format gguf writes the whole model with its Modelfile",
        )  # fmt: skip
    attach.check_adapter(folder, config)
    return Job(folder, base, consumer, stored)


def write_peft(job: Job, out: Path, target: Path) -> list[str]:
    """In PEFT's format with safetensors, tokenizer, template and a card. What is said of it."""
    weights = dict(tensors(adapter_files.weights(job.adapter)))
    stored, said = job.stored, []
    if job.consumer == "vllm" and (stored.get("rank_pattern") or stored.get("alpha_pattern")):
        made, changed = uniform(dict(stored), weights)
        check_same((stored, weights), (made, changed), job.adapter)
        said.append(f"ranks and scales of single layers became one: r {made['r']}, lora_alpha {made['lora_alpha']:g}")
        stored, weights = made, changed
    written = {**stored, "base_model_name_or_path": job.base.model.name, "inference_mode": True}
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({k: t.contiguous() for k, t in weights.items()}, out / "adapter_model.safetensors", {"format": "pt"})
    job.base.tokenizer.save_pretrained(out)
    for name in (IDENTITY_FILE, thinking.FILE):
        if (job.adapter / name).is_file():
            shutil.copyfile(job.adapter / name, out / name)
    write_card(job, out, target.name, stored)
    if job.consumer == "peft":
        return [*said, consumers.in_python(stored, target.resolve())]
    name = served_name(target)
    return [*said, vllm_command(job, stored, job.place, name, target.resolve()), f'asked for with "model": "{name}"']


def check_same(before: Any, after: Any, folder: Path) -> None:
    """RunError unless both compute the same in every layer."""
    one, other = deltas(*before), deltas(*after)
    for layer, (b, a) in one.items():
        size = combine.values((b, a)).norm().item()
        miss = combine.values(combine.beside([(b, a), (-other[layer][0], other[layer][1])])).norm().item()
        if not miss <= EXACT * size:
            raise RunError(f"the export of {folder} differs in {layer} by {miss:.3g}; nothing was written")


def served_name(target: Path) -> str:
    return re.sub(r"[^\w.-]", "-", target.resolve().name)


def vllm_command(job: Job, stored: dict[str, Any], base: str, name: str, folder: Path) -> str:
    """What serves the base with the adapter in `folder`, in the adapter's chat format."""
    size = consumers.size_of(consumers.consumer("vllm"), consumers.largest_rank(stored))
    parts = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", size, "--lora-modules", f"{name}={folder}"]
    if job.own_template:
        parts += ["--chat-template", folder / "chat_template.jinja"]
    return shlex.join(map(str, parts))


def write_card(job: Job, out: Path, title: str, stored: dict[str, Any]) -> None:
    """README.md, whose lines work where it lies."""
    base, name = job.base, shown_name(job.base.model.name)
    licence = model_card.licence_of(base.model.name, base.folder)
    method = str(job.stored["peft_type"]).lower()
    stage = "reward" if job.stored.get("task_type") == "SEQ_CLS" else "sft"
    rows = max(adapter_files.own_embeddings(job.adapter).values(), default=0)
    have = int(base.config.get("vocab_size") or 0)
    if job.consumer == "peft":
        other = rows if rows != have else None
        how = model_card.usage(stage, method, name, None, base.model.revision, sources.is_gguf_base(base.model), other)
    elif job.consumer == "vllm":
        place = "BASE" if job.made_here else name
        how = ["```bash", vllm_command(job, stored, place, served_name(out.with_name(title)), Path()), "```"]
        if job.made_here:
            how = [f"BASE is the folder of {name} that `ft export` names where ft is.", "", *how]
    elif job.consumer == "llama.cpp":
        how = ["```bash", llama_command(job, BASE_FILE, Path()), "```"]
        how = [f"{BASE_FILE} is {name} as a GGUF file.", "", *how]
    else:
        how = ["```bash", ollama_command(out.with_name(title), Path()), "```"]
        how = [f"The line FROM in Modelfile names {name} as it lies where it was exported.", "", *how]
    recipe = model_card.trained_by(job.adapter)
    table = model_card.recipe_rows(*recipe) if recipe else [("method", method)]
    metrics = ["## Metrics", "", *model_card.metrics_of(recipe[1]), ""] if recipe and recipe[1] else []
    head = {"base_model": name, **({"license": licence} if licence else {}),
            "library_name": "peft", "tags": ["ft", method]}  # fmt: skip
    unknown = model_card.UNKNOWN_LICENCE
    lines = [
        *model_card.front(head), f"# {title}", "",
        f"An adapter, exported for {consumers.consumer(job.consumer).what} by `ft export` (package ft-recipes).", "",
        *model_card.table([("base", name), ("licence of the base", licence or unknown), *table]),
        "", *metrics, "## Use", "", *how, "",
    ]  # fmt: skip
    write_atomically(out / "README.md", "\n".join(lines))


def write_llama_cpp(job: Job, out: Path, target: Path) -> list[str]:
    """A GGUF file for --lora, with the chat template where it is not the base's. What is said of it."""
    write_adapter(job.adapter, job.base.folder, out / GGUF_FILE)
    if job.own_template:
        (out / TEMPLATE_FILE).write_text(portable(job.base.tokenizer.chat_template), encoding="utf-8")
    write_card(job, out, target.name, job.stored)
    if sources.is_gguf_base(job.base.model):
        return [llama_command(job, str(sources.gguf_base(job.base.model)), target.resolve())]
    name = job.base.model.name if job.base.model.name in sources.known_names() else job.place
    made = command("merge", "--model", name, "--format", "gguf", "--output", BASE_FILE)
    return [f"its base as a GGUF file: {made}", llama_command(job, BASE_FILE, target.resolve())]


def llama_command(job: Job, base: str, folder: Path) -> str:
    parts = ["llama-cli", "--model", base, "--lora", folder / GGUF_FILE, "--jinja"]
    if job.own_template:
        parts += ["--chat-template-file", folder / TEMPLATE_FILE]
    return shlex.join(map(str, parts))


def write_ollama(job: Job, out: Path, target: Path) -> list[str]:
    """The same with a Modelfile, which asks in the adapter's chat format."""
    base, encoder = sources.gguf_base(job.base.model), job.base.asking(None)
    made = modelfiles.of(
        encoder, str(base), modelfiles.ends(encoder, job.base.folder), begins_by_itself(base),
        about=f"{target.name}, an adapter of {shown_name(job.base.model.name)}.", adapter=f"./{GGUF_FILE}",
    )  # fmt: skip
    if made is None:
        what = "Ollama's Go templates cannot write what the chat template of this adapter writes"
        raise UserError(what, path=job.adapter, key="--for", fix="use --for llama.cpp, which reads chat templates")
    write_adapter(job.adapter, job.base.folder, out / GGUF_FILE)
    (out / "Modelfile").write_text(made.text, encoding="utf-8")
    write_card(job, out, target.name, job.stored)
    missing = [f"not in the Modelfile's template: {'; '.join(made.missing)}"] if made.missing else []
    return [*missing, ollama_command(target, target.resolve())]


def ollama_command(target: Path, folder: Path) -> str:
    return shlex.join(["ollama", "create", model_name(target.resolve().name), "-f", str(folder / "Modelfile")])
