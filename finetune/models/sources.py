"""Where a model's files lie: a built-in base, a local folder, the Hugging Face hub or ModelScope.

    locate(model)          folder or hub id, checked for existence before anything heavy happens
    file(model, filename)  local path of one small file, or None
    folder(model)          local folder of the files that are there (for a hub id the snapshot in the cache)
    commit(model)          the commit of a hub snapshot

Hub settings are the hub client's own: HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 uses only what is in the cache.
"""

from __future__ import annotations

import functools
import importlib
import math
from pathlib import Path

from safetensors import safe_open
from transformers.utils import cached_file

from finetune.errors import UserError
from finetune.families import refused_name
from finetune.recipe import BUILTIN_MODELS, ModelConfig

HUB_HELP = "check the name, or download it first and give the folder (offline: HF_HUB_OFFLINE=1 uses the cache)"
WEIGHTS = ("*.safetensors", "*.bin")
NOT_NEEDED = ("*.py", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "consolidated*")


def builtin_names() -> list[str]:
    return sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/config.json"))


def locate(model: ModelConfig) -> str:
    """The folder of a built-in base or local model, or the hub id itself. UserError if a path does not exist."""
    name, source = model.name, model.source
    if source == "modelscope":
        _refuse_by_name(name)
        return str(modelscope_folder(name, model.revision, weights=False))
    if source is None and name in builtin_names():
        return str(BUILTIN_MODELS / name)
    path = Path(name).expanduser()
    if source != "hub" and path.is_dir():
        return str(_local(path, name))
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if source == "local" or (source is None and looks_local):
        _refuse_by_name(name)
        raise UserError(
            "no such model", path=name, key="model.name",
            fix=f"give a folder, a hub id (owner/name) or a built-in base ({', '.join(builtin_names())})",
        )  # fmt: skip
    _refuse_by_name(name)
    return name


def check(model: ModelConfig) -> None:
    """UserError where `source` or `revision` would have no effect on what is read."""
    is_local = model.name in builtin_names() or Path(model.name).expanduser().exists()
    if model.source == "hub" and Path(model.name).expanduser().exists():
        raise UserError(
            "a local folder has this name, and would be read instead of the hub's", path=model.name,
            key="model.source", fix="rename it or start elsewhere; or leave model.source out to use the folder",
        )  # fmt: skip
    if model.revision is not None and is_local and model.source != "modelscope":
        raise UserError(
            "is a local folder, which has no revisions", path=model.name, key="model.revision", fix="leave it out"
        )


def _local(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path.resolve()
    if (path / "adapter" / "adapter_config.json").is_file() or (path / "adapter_config.json").is_file():
        raise UserError("is an adapter, not a model", path=name, key="model.name", fix="give its base; use --adapter")
    if (path / "model" / "config.json").is_file():  # the run directory of a full fine-tuning
        return (path / "model").resolve()
    raise UserError("has no config.json", path=name, key="model.name", fix="give the folder of a complete model")


def _refuse_by_name(name: str) -> None:
    """Before anything is downloaded."""
    refused = refused_name(name)
    if refused is not None:
        raise UserError(f"{refused.name} {refused.why}", path=name, key="model.name", fix=refused.instead)


def file(model: ModelConfig, filename: str) -> str | None:
    try:
        found: str | None = cached_file(
            locate(model), filename, revision=hub_revision(model), _raise_exceptions_for_missing_entries=False
        )
        return found
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot be read ({reason})", path=model.name, key="model.name", fix=HUB_HELP) from None


def folder(model: ModelConfig) -> Path:
    path = file(model, "config.json")
    if path is None:
        raise UserError("has no config.json", path=model.name, key="model.name", fix=HUB_HELP)
    return Path(path).parent


def stored_dtype(model: ModelConfig) -> str | None:
    """The dtype that most of the weights on disk have; None where no safetensors header tells."""
    sizes: dict[str, int] = {}
    for path in folder(model).glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name)
                sizes[stored.get_dtype()] = sizes.get(stored.get_dtype(), 0) + math.prod(stored.get_shape())
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(max(sizes, key=lambda kind: sizes[kind])) if sizes else None


def weights(model: ModelConfig) -> str:
    """What `from_pretrained` is given: like `locate`, with the weights there for ModelScope."""
    if model.source == "modelscope":
        return str(modelscope_folder(model.name, model.revision, weights=True))
    return locate(model)


def hub_revision(model: ModelConfig) -> str | None:
    """The revision for the hub's client; ModelScope's own client has already used its."""
    return None if model.source == "modelscope" else model.revision


def commit(model: ModelConfig) -> str | None:
    """The commit of a hub snapshot, else the revision that was asked for."""
    path = folder(model)
    return path.name if path.parent.name == "snapshots" else model.revision


@functools.lru_cache(maxsize=16)
def modelscope_folder(name: str, revision: str | None, weights: bool) -> Path:
    """Local folder of a ModelScope model, downloaded by its own client; its code and other formats are left out."""
    try:
        client = importlib.import_module("modelscope")
    except ImportError:
        raise UserError(
            "ModelScope's client is not installed", path=name, key="model.source", fix="pip install modelscope"
        ) from None
    ignored = [*NOT_NEEDED, *(() if weights else WEIGHTS)]
    try:
        return Path(client.snapshot_download(name, revision=revision, ignore_patterns=ignored))
    except Exception as error:  # the client raises many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"cannot be fetched from ModelScope ({reason})", path=name, key="model.name",
            fix="check the name and the network, or download it first and give the folder",
        ) from None  # fmt: skip
