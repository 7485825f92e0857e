"""Rows to be answered, whatever their format: each one whole, as it stands in its file, and the ids of its prompt.

A row that ends with an answer keeps it and is asked without it. Raw text, and with `raw` any single text, is continued
as it stands, without a chat template.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data import checks, formats, sources
from finetune.data.audit import batched
from finetune.data.encoder import Encoder
from finetune.data.messages import text_of
from finetune.data.nulls import filled, without_nulls
from finetune.data.offsets import check_embedded
from finetune.data.readers import EmptyFile, read_text_file
from finetune.data.samples import checked_format
from finetune.data.text import separator
from finetune.data.types import Conversation, Row, RowProblem, Sample, Text
from finetune.errors import UserError

STDIN = "-"
WINDOW = 256  # rows that are sorted by length together; no more are held in memory
TABLES = (".parquet", ".arrow", ".feather")


def rows_of(data: str) -> Iterator[Row]:
    """Every row of a file, folder, pattern, hub id or, for `-`, of stdin, with all of its columns."""
    if data != STDIN:
        yield from sources.read_rows(sources.held_out(data), whole=True)
        return
    try:
        yield from read_text_file(sys.stdin.buffer, "stdin", whole=True)
    except EmptyFile:  # what fills a pipe may find nothing
        return


def numbered(rows: Iterator[Row], limit: int | None) -> Iterator[tuple[int, Row]]:
    """(number from 0, row). UserError where the rest of a file cannot be read: it is not left out."""
    number = 0
    for row in rows:
        if number == limit:
            return
        if row.problem is not None and row.problem.ends_file:
            what, line = row.problem.message, row.problem.line
            raise UserError(what, path=row.file, row=row.row, line=line, fix=row.problem.fix)
        if row.problem is None or row.problem.kind != "empty_file":
            yield number, row
            number += 1


def windows(rows: Iterator[Any], size: int, live: bool) -> Iterator[list[Any]]:
    """Rows in groups of `size`; with `live` as many as have come, so that nobody waits for a slow pipe."""
    if not live:
        yield from batched(rows, size)
        return
    come: queue.Queue[Any] = queue.Queue(size)
    end = object()

    def read() -> None:
        try:
            for row in rows:
                come.put(row)
            come.put(end)
        except BaseException as error:  # raised where the rows are used
            come.put(error)

    threading.Thread(target=read, daemon=True).start()
    last: Any = None
    while last is None:
        window: list[Any] = []
        while last is None and (not window or (len(window) < size and not come.empty())):
            item = come.get()
            if item is end or isinstance(item, BaseException):
                last = item
            else:
                window.append(item)
        if window:
            yield window
    if isinstance(last, BaseException):
        raise last


class Converter:
    """Rows -> samples, in the format that the first rows show."""

    def __init__(self, head: Sequence[Row], columns: Mapping[str, str] | None, path: str) -> None:
        """UserError when no format recognises the rows."""
        self.columns = columns
        self.exported = filled(row.data for row in head)
        cleaned = [row._replace(data=self.cleaned(row)) for row in head]
        self.format = checked_format(None, cleaned, columns, None, path)

    @property
    def is_text(self) -> bool:
        return formats.FORMATS[self.format].kind == "text"

    def cleaned(self, row: Row) -> dict[str, Any]:
        """The row without empty columns, and without nulls that a table filled in."""
        data: dict[str, Any] = row.data
        if self.exported or Path(row.file).suffix.lower() in TABLES:
            data = without_nulls(data)
        return {name: value for name, value in data.items() if value is not None and value != ""}

    def sample(self, row: Row) -> Sample:
        """What is asked. RowProblem when the row cannot be used."""
        if row.problem is not None:
            raise row.problem
        data = self.cleaned(row)
        try:
            found = list(formats.FORMATS[self.format].convert(formats.shaped(data, self.columns)))
        except RowProblem:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            what = f"not a row of format {self.format} ({type(error).__name__}: {error})"
            raise RowProblem("wrong_shape", what, "mend the row") from None
        if len({repr((sample.asked, sample.tools)) for sample in found}) != 1:
            raise RowProblem("several_prompts", f"the row asks {len(found)} things", "give each a row of its own")
        sample = found[0]
        if isinstance(sample, Text):
            findings = checks.check(sample, sample.text)
        else:
            asked = Conversation(sample.asked, sample.tools)
            findings = [*checks.check(asked, asked.whole_text), *checks.unread(data, asked.whole_text)]
        wrong = next((f for f in findings if f.level == "error" and f.kind != "no_answer"), None)
        if wrong is not None:
            raise RowProblem(wrong.kind, wrong.message, wrong.fix)
        if not isinstance(sample, Text) and sample.asked[-1]["role"] not in ("user", "tool"):
            raise RowProblem("no_question", "nothing is asked: the last turn is not the user's", "add the question")
        return sample


@dataclass(frozen=True)
class Prompter:
    """What makes the prompts of one model."""

    encoder: Encoder
    system: str | None = None
    """The system turn of conversations without one."""
    raw: bool = False
    """Continue texts as they stand."""
    longest: int | None = None
    """Tokens that the model was made for."""
    allow_forged: bool = False
    """Turn markers of this model in content: data.on_forged_marker."""

    def continues(self, sample: Sample) -> bool:
        return self.raw or isinstance(sample, Text)

    def ids(self, sample: Sample) -> list[int]:
        """Token ids up to where the answer begins. RowProblem when the model cannot be asked."""
        ids = self.of_text(plain_text(sample)) if self.continues(sample) else self.of_turns(sample)
        if self.longest is not None and len(ids) >= self.longest:
            what = f"the prompt has {len(ids)} tokens, and the model was made for {self.longest}"
            raise RowProblem("overlong", what, "shorten it, or set model.rope_scaling")
        return ids

    def of_turns(self, sample: Sample) -> list[int]:
        messages = sample.asked
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        if not self.allow_forged and (found := self.encoder.forged_markers(messages)):
            turn, marker = found[0]
            what = f"turn {turn}: {marker!r} is a turn marker of this model, and plain text to its tokenizer"
            raise RowProblem("forged_marker", what, "remove it")
        return self.encoder.prompt_ids(messages, sample.tools)

    def of_text(self, text: str) -> list[int]:
        """As a document begins in pre-training."""
        tokenizer = self.encoder.tokenizer
        ids = [*separator(tokenizer), *tokenizer.encode(text, add_special_tokens=False)]
        check_embedded(tokenizer, ids)
        return ids

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """The very characters that follow a text: decoded alone, many tokenizers would drop the space before them."""
        decode = self.encoder.tokenizer.decode
        before: str = decode(prompt, skip_special_tokens=True)
        return str(decode([*prompt, *ids], skip_special_tokens=True))[len(before) :]


def plain_text(sample: Sample) -> str:
    """The only text of a row, to be continued. RowProblem where there are turns."""
    if isinstance(sample, Text):
        return sample.text
    if len(sample.asked) != 1 or sample.tools:
        raise RowProblem("no_text", "a conversation, and --raw continues single texts", "leave --raw out")
    return text_of(sample.asked[0]["content"], "the prompt")
