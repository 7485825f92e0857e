"""Which base an adapter belongs to: a fingerprint of the base's weights, kept beside the adapter.

An adapter put on another base gives fluent nonsense, and nothing in the ecosystem notices.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.sources import commit
from finetune.recipe import ModelConfig

IDENTITY_FILE = "base_identity.json"
WHOLE_BELOW = 1 << 16  # tensors up to 64 KiB are hashed whole
SAMPLES, SAMPLE_BYTES = 64, 1024  # of larger ones, 64 evenly spaced pieces: 15 GB take under a second


def fingerprint(folder: Path) -> str:
    """sha256 over (name, dtype, shape, sampled bytes) of every tensor, the same however the weights are sharded.

    Any training that touches a matrix changes nearly all of its values, so samples see it. Checkpoints that are not
    safetensors are sampled by file. Raises UserError when the folder holds no weights.
    """
    parts: list[tuple[str, bytes]] = []
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("adapter_"):
            parts += _tensors(path)
    if not parts:
        for path in sorted(folder.glob("pytorch_model*.bin")):
            with path.open("rb") as file:
                parts.append((path.name, _sample(file, 0, path.stat().st_size)))
    if not parts:
        raise UserError("holds no weights", path=folder, fix="expected *.safetensors or pytorch_model*.bin")
    digest = hashlib.sha256()
    for name, data in sorted(parts):
        digest.update(name.encode())
        digest.update(data)
    return digest.hexdigest()


def _tensors(path: Path) -> list[tuple[str, bytes]]:
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header: dict[str, Any] = json.loads(file.read(size))
        found = []
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                kind = f"{tensor['dtype']}{tensor['shape']}".encode()
                found.append((name, kind + _sample(file, 8 + size + begin, end - begin)))
        return found


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
        "revision": commit(model),
        "fingerprint": weights,
        "quantization": model.quantization,
        "quantization_type": model.quantization_type if model.quantization == "int4" else None,
        "rope_scaling": model.rope_scaling and model.rope_scaling.model_dump(exclude_none=True),
        "sanity_check": model.sanity_check,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
    }
    (adapter / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def read_identity(adapter: Path) -> dict[str, Any] | None:
    path = adapter / IDENTITY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_identity(adapter: Path, weights: str, base: str) -> None:
    """UserError if the adapter says that it was trained on other weights; adapters of other tools say nothing."""
    identity = read_identity(adapter)
    if identity is not None and identity["fingerprint"] != weights:
        raise UserError(
            f"was trained on another base ({identity['base']}) than {base}", path=adapter, key="model.name",
            fix=f"use the weights it was trained on: {identity['base']}",
        )  # fmt: skip


def locked_template(adapter: Path) -> str | None:
    """The chat template an adapter was trained with. UserError if the file is not the one that was locked."""
    path = adapter / "chat_template.jinja"
    if not path.is_file():
        return None
    template = path.read_text(encoding="utf-8")
    locked = (read_identity(adapter) or {}).get("chat_template_sha256")
    if locked is not None and hashlib.sha256(template.encode()).hexdigest() != locked:
        raise UserError(
            "is not the chat template this adapter was trained with",
            path=path,
            fix="restore the file; answers depend on it",
        )
    return template
