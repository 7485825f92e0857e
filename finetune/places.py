"""Where results go: nothing of the user's is replaced, inputs never are, links are never written through."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finetune.errors import UserError

UNFINISHED = "ft-unfinished"  # the first file in a folder that is being built: it says whose it is, and is the lock


def check_folder(path: Path, key: str, here: bool = True) -> None:
    """UserError for links, files, /, the home folder, what the working directory lies in, and what is read-only.

    Args:
        here: whether the working directory itself will do.
    """
    fix = "choose a folder of its own with --output DIR"
    if "\0" in str(path):
        raise UserError("a path cannot hold a zero byte", path=path, key=key, fix=fix)
    if path.is_symlink():
        what = "is a link, and nothing is written through links"
        raise UserError(what, path=path, key=key, fix=f"give the folder itself: {os.path.realpath(path)}")
    if path.exists() and not path.is_dir():
        raise UserError("is a file", path=path, key=key, fix="choose another directory with --output DIR")
    full, now = path.resolve(), Path.cwd().resolve()
    home = Path(os.path.expanduser("~")).resolve()
    if full == Path(full.anchor) or full == home or full in now.parents or (full == now and not here):
        raise UserError("holds other things than results", path=full, key=key, fix=fix)
    check_writable(full, key)


def check_file(path: Path, key: str, ours: Callable[[Path], bool]) -> None:
    """UserError when `path` cannot be written, or holds what `ours` does not know as an earlier output."""
    if path.is_symlink():
        raise UserError("is a link, and nothing is written through links", path=path, key=key, fix="name a file")
    if path.exists():
        if not path.is_file():
            raise UserError("is no file", path=path, key=key, fix="name a file")
        if path.stat().st_size and not ours(path):
            raise UserError("exists, and is nothing that ft wrote", path=path, key=key, fix="name a new file")
    if not path.parent.is_dir():
        raise UserError("no such folder", path=path.parent, key=key, fix="make it first, or name another file")
    check_writable(path.parent.resolve(), key)


def check_writable(full: Path, key: str) -> None:
    """UserError when the nearest folder above that exists takes no files."""
    while not os.path.lexists(full):
        full = full.parent
    if not full.is_dir():
        raise UserError("is no folder", path=full, key=key, fix="choose another place")
    if not os.access(full, os.W_OK | os.X_OK):
        raise UserError("cannot be written to", path=full, key=key, fix="choose another place, or allow it")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of ours holds; {} for anything else, also what a link names."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not path.is_symlink() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def made_by_ft(report: dict[str, Any]) -> bool:
    """Whether a report names the version of ft that wrote it."""
    return isinstance(report.get("versions"), dict) and "ft" in report["versions"]


def json_with(*keys: str) -> Callable[[Path], bool]:
    """For `check_file`: an object that has these keys."""
    return lambda path: set(keys) <= read_json(path).keys()


def fresh(path: Path) -> Path:
    """A name beside `path`, to be opened with "x": it is nobody's, so nothing is lost and no link is followed."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def is_left(path: Path, of: str) -> bool:
    """Whether it is what a kill leaves of `fresh`, for a file of that name."""
    return re.fullmatch(rf"{re.escape(of)}\.[0-9a-f]{{12}}\.part", path.name) is not None


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def check_part(target: Path, key: str) -> None:
    """UserError when the folder in which `target` would be built is somebody else's."""
    part = part_of(target)
    ours = part.is_dir() and not part.is_symlink() and ((part / UNFINISHED).is_file() or not any(part.iterdir()))
    if os.path.lexists(part) and not ours:
        fix = "move it away, or choose another folder"
        raise UserError("is in the way, and is nothing that ft wrote", path=part, key=key, fix=fix)


@contextmanager
def built_beside(target: Path, key: str, replaced: Callable[[], Collection[str]]) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends, and is gone when the block fails.

    Args:
        replaced: called at the end, when there is something at `target`: the names in it that are ours and go; what
            else lies there moves to the new folder. Raises when nothing may go.
    """
    with unfinished(target, key) as part:
        yield part
        as_umask(part)
        sync_tree(part)
        _swap(part, target, key, replaced)
        sync(target.parent)


@contextmanager
def unfinished(target: Path, key: str) -> Iterator[Path]:
    """An empty folder beside `target` to build it in, gone at the end. What one that was killed left in it goes first;
    UserError while another process is at it."""
    check_part(target, key)
    part = part_of(target)
    part.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(part / UNFINISHED, blocking=False).acquire()
    except Timeout:
        raise UserError("another process is writing here", path=part, key=key, fix="wait, or choose another") from None
    with lock:
        made = part.stat().st_ino
        try:
            for left in part.iterdir():
                if left.name != UNFINISHED:
                    remove(left)
            yield part
        finally:
            if part.is_dir() and part.stat().st_ino == made:  # not somebody else's, where ours was renamed
                shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, target: Path, key: str, replaced: Callable[[], Collection[str]]) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        part.rename(target)
        (target / UNFINISHED).unlink()  # before, a kill would leave a part that is nobody's
        return
    going = replaced()
    staying = [path for path in target.iterdir() if path.name not in {*going, UNFINISHED}]
    if clash := sorted(path.name for path in staying if os.path.lexists(part / path.name)):
        what = f"holds files that ft did not write under names that it needs now ({', '.join(clash)})"
        raise UserError(what, path=target, key=key, fix="move them away")
    old = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    (target / UNFINISHED).unlink()
    for path in staying:
        (old / path.name).rename(target / path.name)
    shutil.rmtree(old)


def sync(path: Path) -> None:
    """A file, or the names in a folder, on the disk and not only in memory: a power cut loses what is not."""
    try:
        number = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):  # file systems without it
            raise
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """All of a folder, and its own name."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        if not path.is_symlink():
            sync(path)


def remove(path: Path) -> None:
    """A file, a folder with what is in it, or a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_umask(folder: Path) -> None:
    """Give the files below a folder of ours the mode of a new file: safetensors and tempfile make them 0600."""
    mask = os.umask(0o077)  # cannot be read without being set
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)
