"""The header of a GGUF file: its metadata, and which weights lie where. No torch.

The reader of the package gguf takes seconds for a large vocabulary; this one skips what nobody asks for.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from finetune.errors import UserError

MAGIC = b"GGUF"
KEY = "model.name"
AGAIN = "download it again"
NO_GGUF = "is a file, and no GGUF file"
INSTALL = "pip install 'ft-recipes[real]' (or gguf)"
VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
KEPT = 4096  # longer arrays (vocabulary, merges) are skipped


@dataclass(frozen=True)
class Header:
    values: dict[str, Any]
    """Metadata; an array longer than KEPT is its length."""
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    """name -> (shape, fastest dimension first; kind of storage; its first byte)"""
    path: Path

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, *_ in self.tensors.values())

    @property
    def kinds(self) -> set[int]:
        """Of the matrices, as numbers; norms are always float32."""
        return {kind for shape, kind, _ in self.tensors.values() if len(shape) > 1}

    def shape(self, name: str) -> tuple[int, ...]:
        """() where the file has no such tensor."""
        return self.tensors[name][0] if name in self.tensors else ()

    def vector(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor of float32."""
        shape, kind, begin = self.tensors[name]
        if kind != 0:
            raise UserError(f"holds {name} in another precision than float32", path=self.path, key=KEY, fix=AGAIN)
        return np.fromfile(self.path, np.float32, math.prod(shape), offset=begin)


def is_gguf(path: Path) -> bool:
    """By its first bytes: Ollama's files have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def refuse_other(path: Path) -> NoReturn:
    """UserError for a file that is none."""
    try:
        with path.open("rb") as file:
            pointer = file.read(19) == b"version https://git"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise UserError(what, path=path, key=KEY, fix="check the file's permissions") from None
    if pointer:
        raise UserError("is a Git LFS pointer, not the model", path=path, key=KEY, fix="git lfs pull")
    raise UserError(NO_GGUF, path=path, key=KEY, fix="give a model's folder or a GGUF file")


def read_header(path: Path) -> Header:
    """UserError for what is no complete GGUF file."""
    stat = path.stat()
    return _header(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _header(path: Path, size: int, changed: int) -> Header:
    with path.open("rb") as file:
        start = file.read(24)
        if start[:4] != MAGIC:
            refuse_other(path)
        try:
            version, tensors, count = struct.unpack("<IQQ", start[4:])
            if version not in (2, 3):
                kind = "big-endian" if version & 0xFFFF == 0 else f"version {version} of the format"
                raise UserError(f"is {kind}, which is not read", path=path, key=KEY, fix="convert it with llama.cpp")
            values = {_string(file): _value(file, _unpack(file, "I")) for _ in range(count)}
            table = dict(_tensor(file) for _ in range(tensors))
            step = int(values.get("general.alignment", 32)) or 32
        except (struct.error, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError):
            raise UserError("is cut off or damaged in its header", path=path, key=KEY, fix=AGAIN) from None
        begin = -(-file.tell() // step) * step
    if missing := next((k for _, k, _ in table.values() if k not in _sizes(path)), None):
        raise UserError(f"holds weights of an unknown kind ({missing})", path=path, key=KEY, fix="pip install -U gguf")
    table = {name: (shape, kind, begin + at) for name, (shape, kind, at) in table.items()}
    end = max((at + _bytes(shape, kind, path) for shape, kind, at in table.values()), default=begin)
    if size < end:
        raise UserError(f"is cut off: {size:,} of {end:,} bytes", path=path, key=KEY, fix=AGAIN)
    return Header(values, table, path)


def begins_by_itself(path: Path) -> bool:
    """Whether llama.cpp begins a prompt for this file with the first token; unsaid, sentencepiece's does."""
    values = read_header(path).values
    return bool(values.get("tokenizer.ggml.add_bos_token", values.get("tokenizer.ggml.model") == "llama"))


def _unpack(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return _exactly(file, _unpack(file, "Q")).decode("utf-8")


def _exactly(file: BinaryIO, length: int) -> bytes:
    if length > 1 << 28:
        raise struct.error("no text is as long as this")
    found = file.read(length)
    if len(found) < length:
        raise struct.error("cut off")
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    """A value of the header; of long arrays only the length."""
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _unpack(file, VALUES[kind])
    inner, count = _unpack(file, "I"), _unpack(file, "Q")
    if count <= KEPT:
        return [_value(file, inner) for _ in range(count)]
    if inner == STRING:
        for _ in range(count):
            file.seek(_unpack(file, "Q"), os.SEEK_CUR)
    else:
        file.seek(count * struct.calcsize(f"<{VALUES[inner]}"), os.SEEK_CUR)
    return count


def _tensor(file: BinaryIO) -> tuple[str, tuple[tuple[int, ...], int, int]]:
    """(name, (shape, kind, offset))"""
    name = _string(file)
    shape = tuple(_unpack(file, "Q") for _ in range(_unpack(file, "I")))
    return name, (shape, _unpack(file, "I"), _unpack(file, "Q"))


def check_package(path: Any) -> None:
    """UserError when GGUF files cannot be written here."""
    try:
        importlib.import_module("gguf")
    except ImportError:
        what = "the package gguf, which writes GGUF files, is not installed"
        raise UserError(what, path=path, key="--format", fix=INSTALL) from None


def _package(path: Path) -> Any:
    """The package gguf. UserError when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError(
            "is a GGUF file, and the package gguf is not installed", path=path, key=KEY, fix=INSTALL
        ) from None


def _sizes(path: Path) -> dict[int, tuple[int, int]]:
    """kind -> (weights in a block, bytes of a block)"""
    return {int(kind): size for kind, size in _package(path).GGML_QUANT_SIZES.items()}


def _bytes(shape: tuple[int, ...], kind: int, path: Path) -> int:
    weights, size = _sizes(path)[kind]
    return math.prod(shape) // weights * size
