"""`ft merge --format gguf`: a merged model, or one that is whole already, as a file for llama.cpp and Ollama.

An adapter is merged by `ft merge` itself first, with all its proofs, into a folder that is gone afterwards.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import child, places
from finetune.base import Base
from finetune.data import templates
from finetune.errors import Interrupted, RunError, UserError
from finetune.models import sources
from finetune.models.gguf.export import OF_DTYPE, Written, check_folder, write_model
from finetune.models.gguf.modelfile import Modelfile
from finetune.models.gguf.places import beside, check_unwritten, model_name
from finetune.models.identity import configs_of
from finetune.recipe.sections import ModelConfig
from finetune.run.writing import write_atomically
from finetune.serving import modelfiles
from finetune.terminal.progress import note, shown_name, warn
from finetune.training import model_card


def run(
    adapter: str | None, output: str, *, model: str | None = None, kind: str | None = None, overwrite: bool = False,
    options: Sequence[str] = (),
) -> None:  # fmt: skip
    """Args: kind: of --gguf-type, by default as the weights are; options: of the merge."""
    target = Path(output).expanduser()
    check_unwritten(target, overwrite)
    base = configs_of(sources.adapter_folder(adapter), model)[0] if adapter else ModelConfig(name=str(model))
    # Before minutes of merging; what is merged is of the same family.
    check_folder(sources.folder(base), kind or "f32", shown_name(base.name))
    # Beside the target: a rename is all that is left to do, and there is room for what has to fit anyway.
    with places.unfinished(target, "--output") as scratch:
        folder = merged(adapter, model, scratch / "merged", options) if adapter else sources.folder(base)
        opened = Base.open(ModelConfig(name=str(folder)) if adapter else base)
        file = scratch / target.name
        written, beside_it = write(opened, folder, file, kind, named(base, target))
        places.as_umask(scratch)
        check_unwritten(target, overwrite)
        os.replace(file, target)
        if beside_it is not None:
            write_atomically(beside(target), beside_it.text)
    tell(target, written, beside_it)


def merged(adapter: str, model: str | None, folder: Path, options: Sequence[str]) -> Path:
    """The folder that `ft merge` writes."""
    words = ["merge", "--adapter", adapter, "--output", str(folder), *(("--model", model) if model else ()), *options]
    code, said = child.run(*words, shown=False)
    for line in said.splitlines():
        note(line.removesuffix(f": {folder}"))  # it will be gone
    if code == 130:
        raise Interrupted("stopped; nothing was written")
    if code == 2:
        raise UserError("cannot be merged, as is said above", path=adapter, key="--adapter")
    if code:
        raise RunError(f"the merge of {adapter} ended with code {code}")
    return folder


def named(base: ModelConfig, target: Path) -> dict[str, str]:
    """Section general of the file: nothing about this machine."""
    name = shown_name(base.name)
    licence = model_card.licence_of(base.name, sources.folder(base))
    facts = {"name": target.stem, "basename": target.stem, "base_model.0.name": name}
    return facts | ({"license": licence} if licence else {})


def write(
    base: Base, folder: Path, file: Path, kind: str | None, facts: dict[str, str]
) -> tuple[Written, Modelfile | None]:
    encoder = base.asking(None)
    dtype = sources.stored_dtype(base.model) or str(base.config.get("dtype") or "bfloat16")
    stops = modelfiles.ends(encoder, folder)
    template = getattr(encoder, "template", None)

    def render(chat: list[Any], prompt: bool) -> str | None:
        return None if template is None else templates.attempt(template, chat, None, encoder.variables, prompt)  # type: ignore[attr-defined]

    written = write_model(
        folder, file, kind or OF_DTYPE.get(dtype, "bf16"), facts=facts, stops=stops, template=template, render=render
    )
    about = f"{facts['name']}, made of {facts['base_model.0.name']}."
    return written, modelfiles.of(encoder, f"./{file.name}", stops, written.begins, about=about)


def tell(target: Path, written: Written, beside_it: Modelfile | None) -> None:
    note(f"written as GGUF ({written.kind}): {target}")
    rounding = f", rounded by at most {written.error:.2g}" if written.error else ""
    note(
        f"proven: transformers reads all {written.tensors:,} tensors back as they were written{rounding}; "
        f"{written.texts} texts have the same tokens ({written.rule})"
    )
    if written.silenced:
        note("chats of this model do not begin with its first token, so the file asks for none (add_bos_token: false)")
    local = shlex.join(["llama-cli", "-m", str(target), "--jinja"])
    if beside_it is None:
        warn("no Modelfile: Ollama's Go templates cannot write what this model's chat template writes")
        note(f"next    {local}")
        return
    if beside_it.missing:
        note(f"not in the Modelfile's template: {'; '.join(beside_it.missing)}")
    note(f"next    {shlex.join(['ollama', 'create', model_name(target.stem), '-f', str(beside(target))])}")
    note(f"        {local}")
