"""Which base an adapter belongs to: a fingerprint of the base's weights, kept beside the adapter.

An adapter put on another base gives fluent nonsense, and nothing in the ecosystem notices.
"""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash

from finetune.errors import UserError
from finetune.models.quantization import HEADS
from finetune.models.sources import base_config, commit
from finetune.models.weight_files import DERIVED, read_json, tensors, weight_files
from finetune.recipe.sections import ModelConfig

IDENTITY_FILE = "base_identity.json"
SCHEME = "xxh3:"  # fingerprints of earlier versions have no such beginning
WHOLE_BELOW = 1 << 16
SAMPLES, SAMPLE_BYTES = 64, 1024


def fingerprint(folder: Path) -> str:
    """A hash over name, dtype, shape and every byte of every tensor that is loaded from the folder.

    The same however the weights are sharded, as safetensors or .bin, with or without a copy of tied embeddings. xxh3
    reads 25 GB/s here, so a large base takes as long as its disk; kept while the files stay as they are. Raises
    UserError when weights are missing or cut off.
    """
    files = [(path, path.stat()) for path in weight_files(folder)]
    return _fingerprint(tuple((path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in files))


@functools.lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    found: dict[str, str] = {}
    for path, *_ in files:
        for name, tensor in tensors(path):
            if not DERIVED.search(name):
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                found[name] = f"{tensor.dtype} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"
    for name in [name for name in found if name.split(".")[-2:-1] and name.split(".")[-2] in HEADS]:
        if list(found.values()).count(found[name]) > 1:  # tied: a copy of the embeddings, which files may leave out
            del found[name]
    digest = xxhash.xxh3_128()
    for name, value in sorted(found.items()):
        digest.update(f"{name} {value}\n".encode())
    return SCHEME + digest.hexdigest()


def is_fingerprint_of(stored: str, folder: Path) -> bool:
    """Whether an adapter's fingerprint is that of the base in `folder`, by the scheme it was made with."""
    if stored.startswith(SCHEME):
        return stored == fingerprint(folder)
    # Until 0.1 every safetensors file counted, loaded or not; the base may have lost or gained such files since.
    if stored == sampled(weight_files(folder)):
        return True
    every = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    try:
        return stored == sampled(every or folder.glob("pytorch_model*.bin"))
    except (ValueError, OverflowError, struct.error):  # one that is not loaded may be anything
        return False


def sampled(files: Iterable[Path]) -> str:
    """The fingerprint of earlier versions: sha256 over samples of every tensor, of every file if not safetensors."""
    parts: list[tuple[str, bytes]] = []
    for path in sorted(files):
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                parts.append((path.name, _sample(file, 0, path.stat().st_size)))
                continue
            size = struct.unpack("<Q", file.read(8))[0]
            header: dict[str, Any] = json.loads(file.read(size))
            for name, tensor in header.items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    kind = f"{tensor['dtype']}{tensor['shape']}".encode()
                    parts.append((name, kind + _sample(file, 8 + size + begin, end - begin)))
    digest = hashlib.sha256()
    for name, data in sorted(parts):
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


def _sample(file: Any, begin: int, length: int) -> bytes:
    if length <= WHOLE_BELOW:
        file.seek(begin)
        return hashlib.sha256(file.read(length)).digest()
    digest = hashlib.sha256(str(length).encode())
    for piece in range(SAMPLES):
        file.seek(begin + piece * (length - SAMPLE_BYTES) // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def write_identity(adapter: Path, model: ModelConfig, weights: str, template: str | None) -> None:
    """`base_identity.json`: the base's name, revision and fingerprint, how it was loaded, a hash of the template."""
    identity = {
        "base": model.name,
        "source": model.source,
        "gguf_file": model.gguf_file,
        "revision": commit(model),
        "fingerprint": weights,
        "quantization": model.quantization,
        "quantization_type": model.quantization_type if model.quantization == "int4" else None,
        "rope_scaling": model.rope_scaling and model.rope_scaling.model_dump(exclude_none=True),
        "sanity_check": model.sanity_check,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
    }
    (adapter / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def read_identity(adapter: Path) -> dict[str, Any]:
    """Empty for adapters of other tools."""
    path = adapter / IDENTITY_FILE
    return read_json(path) if path.is_file() else {}


def check_identity(adapter: Path, folder: Path, base: str) -> None:
    """UserError if the adapter says that it was trained on other weights; adapters of other tools say nothing."""
    identity = read_identity(adapter)
    stored, trained = identity.get("fingerprint"), identity.get("base")
    if stored is not None and not is_fingerprint_of(str(stored), folder):
        raise UserError(
            f"was trained on another base ({trained}) than {base}", path=adapter, key="model.name",
            fix=f"use the weights it was trained on: {trained}",
        )  # fmt: skip


def locked_template(adapter: Path) -> str | None:
    """The chat template an adapter was trained with. UserError if the file is not the one that was locked."""
    path = adapter / "chat_template.jinja"
    if not path.is_file():
        return None
    template = path.read_text(encoding="utf-8")
    locked = read_identity(adapter).get("chat_template_sha256")
    if locked is not None and hashlib.sha256(template.encode()).hexdigest() != locked:
        what = "is not the chat template this adapter was trained with"
        raise UserError(what, path=path, fix="restore the file; answers depend on it")
    return template


def configs_of(adapter: Path, model: str | None = None) -> tuple[ModelConfig, ModelConfig]:
    """(the base of an adapter in its original precision, the same quantized as it was while training)."""
    identity = read_identity(adapter)
    loaded_as = {key: identity[key] for key in ("rope_scaling", "sanity_check") if key in identity}
    original = ModelConfig.model_validate(base_config(adapter, model).model_dump(exclude_unset=True) | loaded_as)
    kind = identity.get("quantization_type") or "nf4"
    quantized = {"quantization": identity.get("quantization"), "quantization_type": kind}
    return original, original.model_copy(update=quantized)
