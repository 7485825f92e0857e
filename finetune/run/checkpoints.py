"""Checkpoints: checkpoint-STEP/, to which `complete` is added last; what is damaged, and which are kept."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import xxhash

from finetune import places
from finetune.run.writing import strict, write_json

CHECKPOINT_COMPLETE = "complete"  # written last into a checkpoint: without it the checkpoint is half-written
NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")
# What transformers, peft, accelerate, DeepSpeed and ft write into one; of a half-written one nothing else is taken.
ENDS = (".safetensors", ".pt", ".pth", ".bin", ".json", ".jinja", ".model", ".distcp", ".metadata", ".part")
NAMES = ("README.md", "vocab.txt", "merges.txt", "latest", "zero_to_fp32.py", CHECKPOINT_COMPLETE)


def named(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def checkpoints_of(folder: Path) -> list[Path]:
    """Every checkpoint-STEP in it, complete or not, newest first. checkpoint-007 and checkpoint-mine-7 are a user's."""
    return [path for path in named(folder) if path.is_dir()]


def complete(checkpoint: Path, apart: Collection[Path] = (), **known: Any) -> None:
    """Mark a checkpoint in which everything is, with what is in it and what has to be known to go on.

    All of it is on the disk before the mark is.

    Args:
        apart: what lies there and is not ours, of `discard`.
    """
    places.as_umask(checkpoint)
    ours = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path not in apart]
    files = {str(path.relative_to(checkpoint)): _sum(path) for path in ours}
    files.pop(CHECKPOINT_COMPLETE, None)
    places.sync_tree(checkpoint)
    seal(checkpoint, {"name": checkpoint.name, "files": files, **known})


def seal(checkpoint: Path, known: dict[str, Any]) -> None:
    """Write the mark, which has a checksum of its own: what it counts is as much of the run as its weights."""
    known = strict(known)
    write_json(checkpoint / CHECKPOINT_COMPLETE, {**known, "sum": _sum_of(known)})


def _sum_of(known: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(known, sort_keys=True).encode()).hexdigest()


def known_of(checkpoint: Path) -> dict[str, Any]:
    """What `complete` was told; nothing where the mark is not as it was written."""
    try:
        found = json.loads((checkpoint / CHECKPOINT_COMPLETE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and found.pop("sum", None) == _sum_of(found) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Keep the newest `keep` complete checkpoints of a folder, and the best one; also half-written ones go.

    To be called when a new one is complete: then there is never a moment without one.
    """
    found = checkpoints_of(folder)
    done = [path for path in found if (path / CHECKPOINT_COMPLETE).is_file()]
    for old in found:
        if old not in done[:keep] and (old not in done or old.name != best) and not old.is_symlink():
            discard(old)


def discard(checkpoint: Path) -> set[Path]:
    """Delete what we wrote into it, its mark first: what a kill leaves of it is half-written, not damaged.

    Returns what else is in it, which stays.
    """
    listed = known_of(checkpoint).get("files", {})
    if (checkpoint / CHECKPOINT_COMPLETE).is_file():
        (checkpoint / CHECKPOINT_COMPLETE).unlink()
    stays = set()
    for path in sorted(checkpoint.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif str(path.relative_to(checkpoint)) in listed or _has_our_name(path, listed):
            path.unlink()
        else:
            stays.add(path)
    if not stays:
        checkpoint.rmdir()
    return stays


def _has_our_name(path: Path, listed: Collection[str]) -> bool:
    """Of a file that no mark lists: whether it may be of a checkpoint that is half-written, or half gone."""
    return not listed and (path.name.endswith(ENDS) or path.name in NAMES)


def not_ours(folder: Path) -> Path | None:
    """Something in a folder of checkpoints that no run wrote there."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if NAME.fullmatch(path.name) and path.is_dir():
            listed = known_of(path).get("files", {})
            inside = [p for p in sorted(path.rglob("*")) if not p.is_dir() and p.name != CHECKPOINT_COMPLETE]
            strange = [p for p in inside if str(p.relative_to(path)) not in listed and not _has_our_name(p, listed)]
            if strange:
                return strange[0]
        elif path.is_dir() or not (path.name.endswith(ENDS) or path.name in NAMES):
            return path
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint; None when all of it can be read."""
    known = known_of(checkpoint)
    if not (checkpoint / CHECKPOINT_COMPLETE).is_file():
        return f"{CHECKPOINT_COMPLETE} is missing"
    if not known:
        return f"{CHECKPOINT_COMPLETE} is not what was written"
    if known.get("name") != checkpoint.name:
        return f"it is a copy of {known.get('name')}"
    for name, written in sorted(known["files"].items()):
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if _sum(path) != written:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not _readable(path):
            return f"{name} cannot be read"
    return None


def _sum(path: Path) -> list[int | str]:
    """[bytes, checksum]"""
    found = xxhash.xxh3_128()  # 10 GB/s: a checkpoint is read faster than it was written
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            found.update(part)
    return [path.stat().st_size, found.hexdigest()]


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
