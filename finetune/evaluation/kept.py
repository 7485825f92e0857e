"""The answers of an evaluation that is not through, kept in the cache: `ft eval --resume` goes on from them.

A file holds those of one model to one set of rows with one way of asking, a line for each: {prompt, text}. It is
written while the answers come, and deleted when everything is reported.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import xxhash

from finetune.cache import cache_folder
from finetune.errors import Interrupted, UserError
from finetune.run import appending
from finetune.terminal.progress import note

FOLDER = "answers"


class Answers:
    """Of one model to one set, by prompt."""

    def __init__(self, known: dict[str, str], file: IO[bytes] | None, drawn: bool = False) -> None:
        self.known, self.file, self.drawn = known, file, drawn
        self.added = 0

    def key(self, prompt: Sequence[int], name: object) -> str:
        """A drawn answer also depends on the row's number."""
        found = xxhash.xxh3_128_hexdigest(array("q", prompt).tobytes())
        return f"{found} {name}" if self.drawn else found

    def get(self, prompt: Sequence[int], name: object) -> str | None:
        return self.known.get(self.key(prompt, name))

    def add(self, prompt: Sequence[int], name: object, text: str) -> None:
        if self.file is not None:
            appending.to(self.file)({"prompt": self.key(prompt, name), "text": text})
            self.added += 1


class Kept:
    """All answers of a command."""

    def __init__(self, resume: bool = False) -> None:
        self.resume, self.opened = resume, dict[Path, Answers]()
        self.told = False  # that they are kept

    def of(self, settings: Mapping[str, Any]) -> Answers:
        """Those of a model, a set and a way of asking, from before where the command goes on."""
        digest = xxhash.xxh3_128_hexdigest(json.dumps(settings, sort_keys=True, default=str).encode())
        path = cache_folder() / FOLDER / f"{digest}.jsonl"
        if path in self.opened:
            return self.opened[path]
        drawn = bool(settings.get("temperature"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab", buffering=0)
        except OSError as error:  # an evaluation can do without
            note(f"no answers can be kept in {path.parent}: {error.strerror}")
            return Answers({}, None)
        try:
            appending.locked(file, path)
        except UserError:
            file.close()
            note("the same evaluation runs in another process: its answers are kept, those of this one are not")
            return Answers({}, None)
        known, size = lines_of(path) if self.resume else ({}, 0)
        file.truncate(size)
        if self.resume:
            note(
                f"--resume: {len(known):,} answers are there"
                if known
                else "--resume: no answers are there to go on with"
            )
        self.opened[path] = Answers(known, file, drawn)
        return self.opened[path]

    def count(self) -> int:
        return sum(len(answers.known) + answers.added for answers in self.opened.values())

    def interrupted(self) -> None:
        """Interrupted with how to go on, where there are answers to go on from."""
        if count := self.count():
            self.told = True
            raise Interrupted(f"interrupted with {count:,} answers kept", add=["--resume"])

    def close(self, done: bool) -> None:
        """done: everything is reported, and nothing needs to be kept."""
        count = self.count()
        for path, answers in self.opened.items():
            if done:
                with suppress(OSError):
                    path.unlink()
            if answers.file is not None:
                answers.file.close()
        if count and not done and not self.told:
            note(f"{count:,} answers are kept: the same command with --resume goes on from them")


def lines_of(path: Path) -> tuple[dict[str, str], int]:
    """(answers by prompt, bytes of their lines), up to a line that a kill has cut off."""
    found: dict[str, str] = {}
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                values: Any = json.loads(line) if line.endswith(b"\n") else None
                found[values["prompt"]] = values["text"]
            except (ValueError, TypeError, KeyError):
                break
            size += len(line)
    return found, min(size, os.path.getsize(path))
