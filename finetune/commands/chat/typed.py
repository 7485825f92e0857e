"""What is typed, or comes from a pipe: messages of one line or several, and commands."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import dataclass

from finetune.errors import UserError

BLOCK = '"""'
ORDER = re.compile(r"\s*/(?!/)(\S*)[ \t]*")
HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Typed:
    text: str
    order: str | None = None
    """The word behind the slash, for a command."""


class Typing:
    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self.edited = self.interactive and sys.stdout.isatty()
        self.lines = 0
        if self.edited:
            with contextlib.suppress(ImportError):  # Windows has none
                import readline  # noqa: F401  (input() then has arrow keys and a history)

    def line(self, prompt: str) -> str:
        """UserError for what is no text; EOFError and KeyboardInterrupt as they come."""
        if self.interactive and not self.edited:  # stdout is a file or a pipe, for answers
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            text = input(prompt if self.edited else "")
        except UnicodeDecodeError:
            text = "\udcff"
        self.lines += 1
        if HALVES.search(text):  # what a C locale makes of bytes that are no UTF-8
            raise UserError("the input is not UTF-8 text", line=self.lines, fix="save or send it as UTF-8")
        return text.removeprefix("\ufeff") if self.lines == 1 else text

    def read(self) -> Typed:
        '''The next message or command: a line, with the next ones where it ends in one backslash, or all between two
        """. UserError, from a pipe, for a text that never ends.'''
        text = self.line("> ")
        found = ORDER.match(text)
        order, rest = (None, text) if found is None else (found[1], text[found.end() :])
        if found is not None and BLOCK in found[1]:  # /"""
            order, rest = found[1].partition(BLOCK)[0], text[text.index(BLOCK) :]
        if rest.lstrip().startswith(BLOCK):
            return Typed(self.block(rest.lstrip()[len(BLOCK) :]), order)
        while rest.endswith("\\") and not rest.endswith("\\\\"):
            rest = rest[:-1] + "\n"
            with contextlib.nullcontext() if self.interactive else contextlib.suppress(EOFError):
                rest += self.line(". ")
        rest = rest.strip()
        return Typed(rest[1:] if order is None and rest.startswith("//") else rest, order)

    def block(self, text: str) -> str:
        begun = self.lines
        while not text.rstrip().endswith(BLOCK):
            try:
                text += "\n" + self.line(". ")
            except EOFError:
                if self.interactive:
                    raise
                raise UserError(f"what begins with {BLOCK} never ends", line=begun, fix=f"add {BLOCK}") from None
        return text.rstrip()[: -len(BLOCK)].strip("\n")
