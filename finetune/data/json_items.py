"""A json list read item by item, holding one chunk and one item in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune.data.messages import kind_of
from finetune.data.types import Row, RowProblem
from finetune.errors import UserError

CHUNK = 1 << 20
LISTS = ("data", "rows", "train", "examples")


class JsonItems:
    """Parses a json list item by item, holding one chunk and one item in memory."""

    def __init__(self, text: Any, name: str) -> None:
        self.text, self.name = text, name
        self.buffer, self.at, self.line, self.done = "", 0, 1, False

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

    def value(self) -> Any:
        """The json value that starts here."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or not self.more():
                    self.at = end
                    return value
            except RecursionError:
                raise RowProblem("malformed_json", "nested too deeply", "mend the file", self.line) from None
            except json.JSONDecodeError as error:
                # Cut off by the end of the chunk, or really wrong? An error well before the end is real.
                cut = error.pos >= len(self.buffer) - 16 or error.msg.startswith("Unterminated string")
                size = len(self.buffer) - self.at
                while cut and len(self.buffer) - self.at < 2 * size + CHUNK and self.more():
                    pass
                if not cut or len(self.buffer) - self.at == size:
                    line = self.line + self.buffer.count("\n", 0, error.pos)
                    raise RowProblem(
                        "malformed_json", f"not valid JSON: {short(error)}", "mend the file", line
                    ) from None

    def __iter__(self) -> Iterator[Row]:
        number = 1
        try:
            if self.peek() == "{":
                value = self.value()
                for number, item in enumerate(rows_inside(value) or [value], 1):
                    yield item_row(item, self.name, number)
                return
            self.at += 1
            if self.peek() == "]":
                raise UserError("the list is empty", path=self.name, fix="name a file with rows")
            while True:
                yield item_row(self.value(), self.name, number)
                mark = self.peek()
                if mark == "]":
                    return
                if mark != ",":
                    line = self.line + self.buffer.count("\n", 0, self.at)
                    what = "expected ',' or ']'" if mark else "the list has no closing ']'"
                    raise RowProblem(
                        "malformed_json", f"not valid JSON: {what} after item {number}", "mend the file", line
                    )
                self.at += 1
                number += 1
                self.peek()
        except RowProblem as problem:
            problem.ends_file = True
            yield Row({}, self.name, number, problem)


def item_row(item: Any, name: str, number: int) -> Row:
    if isinstance(item, dict):
        return Row(item, name, number)
    what = f"the row is {kind_of(item)}, not an object"
    return Row({}, name, number, RowProblem("not_an_object", what, 'write {"column": value, …}'))


def rows_inside(value: dict[str, Any]) -> list[Any] | None:
    """The list of rows in {"data": [...]} and the like, None when the object itself is the row."""
    return next((value[n] for n in LISTS if is_rows(value.get(n))), None) if len(value) <= 3 else None


def no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no JSON number", "", 0)


DECODER = json.JSONDecoder(parse_constant=no_constant)


def is_rows(value: Any) -> bool:
    """A list of row objects (and not the turns of a conversation)."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not {"role", "from"} & set(value[0])
    )


def short(error: ValueError) -> str:
    return error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else str(error)


def recode(data: bytes) -> str:
    """The likely encoding, as advice."""
    for encoding in ("gb18030", "big5"):
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return f"convert it: iconv -f {encoding} -t utf-8"
    return "save the file as UTF-8"
