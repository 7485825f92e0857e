"""Checkpoints: checkpoint-STEP/, to which `complete` is added last; what is damaged, and which are kept."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import xxhash

from finetune import places
from finetune.run.writing import write_json

CHECKPOINT_COMPLETE = "complete"  # written last into a checkpoint: without it the checkpoint is half-written


def checkpoints_of(folder: Path) -> list[Path]:
    """Every checkpoint-STEP in it, complete or not, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def complete(checkpoint: Path, **known: Any) -> None:
    """Mark a checkpoint in which everything is, with what is in it and what has to be known to go on.

    All of it is on the disk before the mark is.
    """
    places.as_umask(checkpoint)
    files = {str(p.relative_to(checkpoint)): _sum(p) for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    files.pop(CHECKPOINT_COMPLETE, None)
    places.sync_tree(checkpoint)
    write_json(checkpoint / CHECKPOINT_COMPLETE, {"files": files, **known})


def known_of(checkpoint: Path) -> dict[str, Any]:
    """What `complete` was told; nothing of checkpoints of earlier versions."""
    try:
        found = json.loads((checkpoint / CHECKPOINT_COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Keep the newest `keep` complete checkpoints of a folder, and the best one; also half-written ones go.

    To be called when a new one is complete: then there is never a moment without one.
    """
    found = checkpoints_of(folder)
    done = [path for path in found if (path / CHECKPOINT_COMPLETE).exists()]
    for old in found:
        if old not in done[:keep] and (old not in done or old.name != best) and not old.is_symlink():
            discard(old)


def discard(checkpoint: Path) -> None:
    """Delete it, its mark first: what a kill leaves of it is half-written, not damaged."""
    (checkpoint / CHECKPOINT_COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint; None when all of it can be read."""
    files = known_of(checkpoint).get("files")
    if files is None:
        if (checkpoint / CHECKPOINT_COMPLETE).stat().st_size:
            return f"{CHECKPOINT_COMPLETE} cannot be read"
        ours = {"state.json"} if (checkpoint / "state.json").exists() else {"trainer_state.json", "scheduler.pt"}
        files = dict.fromkeys({"optimizer.pt"} | ours | {p.name for p in checkpoint.iterdir() if p.is_file()})
        files.pop(CHECKPOINT_COMPLETE)
        if not any(name.endswith((".safetensors", ".bin")) for name in files):
            return "it holds no weights"
    for name, size in sorted(files.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if size is not None and size != _sum(path, of=size):
            return f"{name} is not what was written"
        if not _readable(path):
            return f"{name} cannot be read"
    return None


def _sum(path: Path, of: Any = None) -> list[int | str]:
    """[bytes, checksum]; `of` is one of an earlier version to compare with: [bytes, CRC-32 or nothing]."""
    size = path.stat().st_size
    if of is not None and (len(of) < 2 or isinstance(of[1], int)):
        return [size, zlib.crc32(path.read_bytes())] if len(of) == 2 else [size]
    found = xxhash.xxh3_128()  # 10 GB/s: a checkpoint is read faster than it was written
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            found.update(part)
    return [size, found.hexdigest()]


def _readable(path: Path) -> bool:
    """Whether a file is whole, as far as its form tells."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()  # its directory stands at the end
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(length := struct.unpack("<Q", file.read(8))[0]))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error, zipfile.BadZipFile):
        return False
    return True
