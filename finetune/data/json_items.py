"""Json read value by value, holding one chunk and one row in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune.data.messages import kind_of
from finetune.data.types import Row, RowProblem
from finetune.errors import UserError
from finetune.json_text import DECODER, DEPTH, reason, too_deep

CHUNK = 1 << 20
LIMIT = 16 << 20  # one row: longer than any context; more is a file that broke, or no rows at all
LISTS = frozenset(("data", "rows", "train", "examples"))
ROW = frozenset(("messages", "conversations", "instruction", "prompt", "question", "query", "input", "text", "chosen"))
"""Columns that only a row has: a list beside one of them is a column of that row."""


class JsonItems:
    """The rows of a text of one or more json values: lists of rows, rows one after another, {"data": [rows]}."""

    def __init__(self, text: Any, name: str, bounded: bool = True) -> None:
        self.text, self.name, self.bounded = text, name, bounded
        self.buffer, self.at, self.line, self.done = "", 0, 1, False
        self.begun = False  # a row was begun that is not yet given

    def more(self) -> bool:
        """Read on, forgetting what was used. False at the end of the file."""
        if self.done:
            return False
        try:
            chunk = self.text.read(CHUNK)
        except UnicodeDecodeError as error:
            raise RowProblem("not_utf8", "not UTF-8", recode(error.object), self.line) from None
        self.line += self.buffer.count("\n", 0, self.at)
        self.buffer, self.at, self.done = self.buffer[self.at :] + chunk, 0, not chunk
        return bool(chunk)

    def peek(self) -> str:
        """The next character that is not white space, '' at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer) or not self.more():
                return self.buffer[self.at : self.at + 1]

    def problem(self, what: str, at: int) -> RowProblem:
        line = self.line + self.buffer.count("\n", 0, max(at, self.at))
        return RowProblem("malformed_json", what, "mend the file", line)

    def value(self) -> Any:
        """The json value that starts here."""
        self.begun = True
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or not self.more():
                    brackets = self.buffer.count("[", self.at, end) + self.buffer.count("{", self.at, end)
                    if brackets > DEPTH and too_deep(value, DEPTH if self.bounded else DEPTH + 2):
                        raise self.problem("nested too deeply", self.at)
                    if self.bounded and end - self.at > LIMIT:
                        raise too_long()
                    self.at = end
                    return value
            except RecursionError:
                raise self.problem("nested too deeply", self.at) from None
            except json.JSONDecodeError as error:
                # Cut off by the end of the chunk, or really wrong? An error well before the end is real.
                cut = error.pos >= len(self.buffer) - 16 or error.msg.startswith("Unterminated string")
                size, offset = len(self.buffer) - self.at, error.pos - self.at  # `more` moves the buffer
                if cut and self.bounded and size > LIMIT:
                    raise too_long() from None
                while cut and len(self.buffer) - self.at < 2 * size + CHUNK and self.more():
                    pass
                if not cut or len(self.buffer) - self.at == size:
                    raise self.problem(f"not valid JSON: {reason(error)}", self.at + offset) from None
            except ValueError as error:
                raise self.problem(f"not valid JSON: {reason(error)}", self.at) from None

    def items(self) -> Iterator[Any]:
        """The items of the list that starts here."""
        self.at += 1
        number = 0
        while self.peek() != "]" or number:
            yield self.value()
            number += 1
            mark = self.peek()
            if mark == "]":
                break
            if mark != ",":
                what = "expected ',' or ']'" if mark else "the list has no closing ']'"
                raise self.problem(f"not valid JSON: {what} after item {number}", self.at)
            self.at += 1
            self.peek()
        self.at += 1

    def values(self) -> Iterator[Any]:
        while mark := self.peek():
            if mark == "[":
                yield from self.items()
            else:
                value = self.value()
                inner = rows_inside(value) if isinstance(value, dict) else None
                yield from [value] if inner is None else inner

    def __iter__(self) -> Iterator[Row]:
        number = 0
        try:
            for number, item in enumerate(self.values(), 1):
                self.begun = False
                yield item_row(item, self.name, number)
        except RowProblem as problem:
            problem.ends_file = True
            yield Row({}, self.name, max(1, number + self.begun), problem)
            return
        if not number:
            raise UserError("the list is empty", path=self.name, fix="name a file with rows")


def item_row(item: Any, name: str, number: int) -> Row:
    return Row(item, name, number) if isinstance(item, dict) else Row({}, name, number, no_object(item))


def no_object(item: Any) -> RowProblem:
    return RowProblem("not_an_object", f"the row is {kind_of(item)}, not an object", 'write {"column": value, …}')


def rows_inside(value: dict[str, Any]) -> list[Any] | None:
    """The list of rows in {"data": [...]} and the like, None when the object itself is the row."""
    if LISTS.isdisjoint(value) or len(value) > 3 or not ROW.isdisjoint(value):
        return None
    return next((value[n] for n in value if n in LISTS and is_rows(value[n])), None)


def is_rows(value: Any) -> bool:
    """A list of row objects (and not the turns of a conversation)."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and first.keys().isdisjoint(("role", "from"))


def too_long() -> RowProblem:
    return RowProblem("too_long", f"a row of over {LIMIT >> 20} MB", "split it, or remove it")


def recode(data: bytes) -> str:
    """The likely encoding, as advice."""
    for encoding in ("gb18030", "big5"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return f"convert it: iconv -f {encoding} -t utf-8"
    return "save the file as UTF-8"
