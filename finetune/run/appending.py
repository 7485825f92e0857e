"""JSON lines that are written row by row, and gone on with after an interruption: one line for each row that is read.

Beside FILE lies FILE.ft.json: it says whose file this is, and with which models and settings its rows were made. Which
rows are done is read off the file itself.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from finetune import places
from finetune.errors import Problem, UserError
from finetune.run.directory import versions
from finetune.run.resuming import changed_keys, shown, value_at
from finetune.run.writing import as_line, escaped, write_json

KEY = "--output"
ANEW = "start anew with --overwrite, or name another file"


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".ft.json")


def is_ours(path: Path) -> bool:
    """Whether a file is one that `ft generate` wrote, by what lies beside it."""
    made = places.read_json(beside(path))
    return made.get("command") == "generate" and places.made_by_ft(made)


def check(path: Path, overwrite: bool, resume: bool) -> None:
    """UserError when `path` cannot be written, or holds what is not ours."""
    places.check_file(path, KEY, is_ours)
    places.check_file(beside(path), KEY, lambda _: is_ours(path))
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", fix="give one of them")
    if resume and not path.exists():
        raise UserError("no such file to go on with", path=path, key=KEY, fix="leave --resume out to start it")


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """UserError naming what differs from the settings that the rows in `path` were made with."""
    before = places.read_json(beside(path)).get("settings") or {}
    now = json.loads(json.dumps(settings))
    problems = []
    for key in changed_keys(before, now):
        old, new = (value_at(values, key) for values in (before, now))
        what = f"{shown(new)} now, and {shown(old)} in the rows that are there"
        if key.startswith("models.") and new is None:
            what = "wrote the rows that are there, and is not asked now"
        elif key.startswith("models.") and old is None:
            what = "is asked now, and did not write the rows that are there"
        problems.append(Problem(what, path, key=key, fix=ANEW))
    if problems:
        raise UserError(problems)


def done_in(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, bytes of its line) of every whole line. UserError for a line that is no row."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return  # cut off by a kill or a full disk
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError("is no row that ft wrote", path=path, line=number, key=KEY, fix=ANEW)
            yield row, len(line)


def jsonable(value: Any) -> Any:
    """A value of a table as JSON has it: dates and decimals as text, bytes in base64."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def line_of(row: dict[str, Any]) -> bytes:
    return f"{escaped(as_line(row).rstrip())}\n".encode()


def opened(path: Path, size: int, seen: int, settings: dict[str, Any], more: dict[str, Any]) -> IO[bytes]:
    """The file, to be written behind its first `size` bytes, in whole lines. UserError while another process writes.

    Args:
        seen: its bytes when these were counted.
        settings, more: what `FILE.ft.json` says of them; only `settings` must be the same to go on.
    """
    file = path.open("ab", buffering=0)
    try:
        locked(file, path)
        if os.fstat(file.fileno()).st_size != seen:
            raise UserError("another process has written here", path=path, key=KEY, fix="start again")
        report = {"command": "generate", "settings": settings, **more, "versions": versions()}
        write_json(beside(path), report)
        file.truncate(size)
    except BaseException:
        file.close()
        raise
    return file


def locked(file: IO[bytes], path: Path) -> None:
    with suppress(ImportError):  # Windows has no such lock
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "another process is writing here", path=path, key=KEY, fix="wait, or name another"
            ) from None


def to(file: IO[bytes]) -> Callable[[dict[str, Any]], None]:
    """What writes one row as a whole line."""

    def write(row: dict[str, Any]) -> None:
        line = memoryview(line_of(row))
        while line:  # a full disk or a signal may take only a part
            line = line[os.write(file.fileno(), line) :]

    return write
