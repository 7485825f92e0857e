"""A GGUF file as a base: the ordinary model folder that is made of it once, and kept in the cache. No torch.

GGUF is the format of llama.cpp, Ollama and LM Studio: one file with weights (mostly quantized), tokenizer and chat
template. transformers reads it slowly and trains no such weights, so a file is converted once (conversion.py) and the
folder is kept under the file's content. Everything else sees that folder.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path

import xxhash
from filelock import FileLock

from finetune import places
from finetune.cache import cache_folder
from finetune.errors import UserError
from finetune.models.gguf.checks import check_kind, refuse_part, stored_bytes
from finetune.models.gguf.header import KEY, read_header
from finetune.run.writing import write_json
from finetune.terminal.progress import task

VERSION = 2  # of the conversion: another number, and every file is converted again
NOTES = "ft-gguf.json"  # what a converted folder was made of, and the sizes of its files


def check(path: Path) -> None:
    """UserError for a file that cannot become a base, and where there is no room for it. Once it is converted, nothing
    is looked at."""
    refuse_part(path)
    if complete(target := folder_of(path)):
        return
    header = read_header(path)
    check_kind(header)
    needed = header.parameters * stored_bytes(header)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.05:
        what = f"becomes a folder of {needed / 1e9:.1f} GB, and {target.parent} has room for {free / 1e9:.1f} GB"
        raise UserError(what, path=path, key=KEY, fix="make room, or set HF_DATASETS_CACHE to a folder that has it")


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
    lock = FileLock(target.with_name(target.name + ".lock"))
    with task("waiting for another process, which converts the same file", after=2.0):
        lock.acquire()
    try:
        if not complete(target):  # by the process that was waited for
            from finetune.models.gguf.conversion import convert

            with places.built_beside(target, KEY, lambda: [p.name for p in target.iterdir()]) as part:
                convert(read_header(path), part)
                sizes = {file.name: file.stat().st_size for file in part.iterdir() if file.name != places.UNFINISHED}
                write_json(part / NOTES, {"made_of": path.name, "files": sizes})
    finally:
        lock.release()
    return target
