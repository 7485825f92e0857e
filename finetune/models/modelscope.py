"""Models of ModelScope (`model.source: modelscope`), by its own client. No torch."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.errors import UserError

WEIGHTS = ("*.safetensors", "*.bin")
NOT_NEEDED = ("*.py", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "consolidated*")


def client(name: str, key: str, module: str = "modelscope") -> Any:
    """A module of its client. UserError for the model `name` when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        what = "ModelScope's client is not installed"
        raise UserError(what, path=name, key=key, fix="pip install modelscope") from None


@functools.lru_cache(maxsize=16)
def folder(name: str, revision: str | None, weights: bool = False, only: str | None = None) -> Path:
    """Local folder of a model, downloaded; its code and other formats are left out, and its weights without `weights`;
    or everything but the file `only`."""
    loads = client(name, "model.source")
    wanted = {"ignore_patterns": [*NOT_NEEDED, *(() if weights else WEIGHTS)]}
    if only is not None:
        wanted = {"allow_patterns": [only]}
    try:
        return Path(loads.snapshot_download(name, revision=revision, **wanted))
    except Exception as error:  # the client raises many kinds
        what, fix = hub.why(error, "ModelScope")
        raise UserError(what, path=name, key="model.name", fix=fix) from None


def has(name: str, revision: str | None) -> bool:
    """Whether the model is in the client's cache; False without the client, which `folder` reports."""
    try:
        loads = client(name, "model.source")
        return bool(loads.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        return False
