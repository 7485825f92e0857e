"""Where a GGUF file goes, with the Modelfile beside it, and which files are ours. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from finetune import places
from finetune.errors import UserError
from finetune.models.gguf.header import read_header

SUFFIX = ".gguf"
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""--gguf-type -> how matrices are stored; vectors are always F32."""
MADE = "ft.version"
"""Key of the metadata by which a file of ours is known."""
MODELFILE = "# Written by ft merge."
"""First line of a Modelfile of ours."""


def check_type(kind: str | None) -> None:
    if kind is not None and kind not in TYPES:
        raise UserError(f"unknown type {kind!r}", key="--gguf-type", fix=f"one of {', '.join(TYPES)}")


def beside(path: Path) -> Path:
    """The Modelfile of a GGUF file."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.Modelfile")


def model_name(file: str) -> str:
    """What Ollama may call a model, after a file or folder."""
    return re.sub(r"[^a-z0-9._-]+", "-", file.lower()).strip("-") or "model"


def check_unwritten(path: Path, overwrite: bool) -> None:
    """UserError where a GGUF file or its Modelfile cannot be written, or something stands that may not go."""
    if path.suffix != SUFFIX:
        raise UserError("is no name of a GGUF file", path=path, key="--output", fix=f"name a file: {path.name}{SUFFIX}")
    for file, ours in ((path, is_gguf_of_ours), (beside(path), is_modelfile_of_ours)):
        places.check_file(file, "--output", ours)
        if file.exists() and file.stat().st_size and not overwrite:
            raise UserError("exists", path=file, key="--output", fix="choose another name, or --overwrite")
    places.check_part(path, "--output")


def is_gguf_of_ours(path: Path) -> bool:
    try:
        return MADE in read_header(path).values
    except (UserError, OSError):
        return False


def is_modelfile_of_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MODELFILE)) == MODELFILE.encode()
