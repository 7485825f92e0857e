"""One source of the recipe -> its samples, each with its place; nothing is lost silently.

    read_samples(spec, config, kind) -> Iterator[Item]       in file order, problems included
    specs(config) -> the sources of data.train, as dicts
    watched(rows, config) -> the same rows, counted on the screen

Formats are recognised per source from its first rows. Training data, audit, preview and evaluation all read through
here.
"""

from __future__ import annotations

import heapq
import itertools
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import xxhash

from finetune.data import formats, sources
from finetune.data.messages import is_plain
from finetune.data.nulls import filled, without_nulls
from finetune.data.types import Conversation, Preference, Row, RowProblem, Sample, Text, Unpaired
from finetune.errors import UserError
from finetune.terminal.progress import shown_name, task

SNIFFED = 100
R = TypeVar("R")
STAGES = {"sft": "ft sft", "preference": "ft dpo or ft reward", "unpaired": "ft kto", "text": "ft pretrain"}


class Item(NamedTuple):
    """A sample, or why there is none, with its place."""

    file: str
    row: int
    sample: Sample | None
    problem: RowProblem | None = None
    weight: float = 1.0
    data: dict[str, Any] = {}  # noqa: RUF012 (the row as read, never written to)


def specs(config: Any) -> list[dict[str, Any]]:
    """The sources of a data section (or of one spec)."""
    train = getattr(config, "train", config)
    return [sources.as_dict(spec) for spec in (train if isinstance(train, list | tuple) else [train])]


def watched(rows: Iterator[R], config: Any, what: str = "tokenising") -> Iterator[R]:
    """The rows of a data section, with a line that counts them."""
    total, name = expected_rows(config), named(config)
    with task(f"{what} {name}") if total is None else task(what, total, f"rows of {name}") as advance:
        for row in rows:
            advance(1)
            yield row


def named(config: Any) -> str:
    """The sources in few words."""
    names = [shown_name(str(spec["path"])) for spec in specs(config)]
    return ", ".join([*names[:2], *(["…"] if len(names) > 2 else [])])


COUNTED = {".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".text"}


def expected_rows(config: Any) -> int | None:
    """About how many rows the sources hold, by their lines; None where that says nothing or would take long."""
    if getattr(config, "text_unit", "line") != "line":
        return None
    total = 0
    for spec in specs(config):
        limit = spec.get("max_samples") or getattr(config, "max_samples", None)
        local = not sources.is_hub(spec) and spec.get("source") != "modelscope"
        files = sources.files_of(spec["path"], spec.get("split")) if local else []
        plain = files and all(file.suffix in COUNTED for file in files) and not spec.get("filter")
        if not plain or sum(file.stat().st_size for file in files) > COUNTED_BELOW:
            return None
        lines = sum(map(lines_in, files))
        total += min(lines, limit) if limit else lines
    return total


COUNTED_BELOW = 1 << 32  # 4 GiB: two seconds


def lines_in(file: Path) -> int:
    count, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            count, last = count + block.count(b"\n"), block
    return count + (not last.endswith(b"\n")) - (file.suffix in (".csv", ".tsv"))


def as_held_out(config: Any) -> Any:
    """What of the training data's settings holds for held-out rows: names of columns, and what a document is."""
    return SimpleNamespace(columns=getattr(config, "columns", None), text_unit=getattr(config, "text_unit", "line"))


def read_samples(spec: Any, config: Any, kind: str | None = "sft", *, seed: int = 42) -> Iterator[Item]:
    """All samples of one source in order; unreadable and unconvertible rows as items with a problem.

    kind: what the stage needs (sft, preference, unpaired, text), None for anything. UserError when the source does not
    exist, when no format recognises its rows, or when they are of another kind.
    """
    spec = sources.as_dict(spec)
    columns = spec.get("columns") or getattr(config, "columns", None)
    weight = float(spec.get("weight", 1.0))
    streaming, unit = getattr(config, "streaming", False), getattr(config, "text_unit", "line")
    rows = sources.read_rows(spec, streaming=streaming, unit=unit)
    head = list(itertools.islice(rows, SNIFFED))
    name = spec.get("format") or getattr(config, "format", None)
    name = checked_format(name, head, columns, kind, str(spec["path"]))
    exported = filled(row.data for row in head)
    limit = spec.get("max_samples") or getattr(config, "max_samples", None)
    everything: Iterator[Row] = itertools.chain(head, rows)
    if limit is not None:
        shuffled = getattr(config, "shuffle", False)
        everything = drawn(everything, limit, seed) if shuffled else itertools.islice(everything, limit)
    convert = formats.FORMATS[name].convert
    for row in everything:
        data, file, number, problem = row
        if problem is None:
            try:
                if exported:
                    data = without_nulls(data)
                for sample in convert(formats.shaped(data, columns)):
                    yield Item(file, number, sample, None, weight, data)
                continue
            except RowProblem as found:
                problem = found
            except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
                # A shape no converter foresaw is still the row's fault, not a reason for a traceback.
                what = f"not a row of format {name} ({type(error).__name__}: {error})"
                problem = RowProblem("wrong_shape", what, "mend the row, or set data.format")
        yield Item(file, number, None, problem, weight, data)


def kind_of(path: str) -> str | None:
    """What the rows of a local source are (sft, preference, unpaired, text); None where they cannot be read."""
    spec = sources.as_dict(path)
    if sources.is_hub(spec):
        return None
    try:
        head = list(itertools.islice(sources.read_rows(spec), SNIFFED))
        return formats.FORMATS[checked_format(None, head, None, None, path)].kind
    except UserError:
        return None


def checked_format(name: str | None, head: list[Row], columns: Any, kind: str | None, path: str) -> str:
    """The format to read with: the one asked for, or the one recognised."""
    if name is None:
        good = [row.data for row in head if row.problem is None]
        if not good:
            return "text" if kind == "text" else "messages"  # nothing readable: every row carries its own problem
        try:
            name = formats.detect(good, columns)
        except UserError as error:
            raise UserError(error.problems[0].message, path=path, fix=error.problems[0].fix) from None
    if name not in formats.FORMATS:
        raise UserError(f"unknown format {name!r}", key="data.format", fix=f"use one of {', '.join(formats.FORMATS)}")
    found = formats.FORMATS[name].kind
    if kind is not None and found != kind and (kind, found) != ("unpaired", "preference"):
        raise UserError(
            f"the rows are {found} data ({name}), but this stage needs {kind} data",
            path=path, fix=f"use {STAGES[found]}, or set data.format",
        )  # fmt: skip
    return name


def drawn(rows: Iterator[Row], count: int, seed: int) -> Iterator[Row]:
    """`count` rows chosen at random, in their order, holding only those in memory."""
    chosen: list[tuple[int, int, Row]] = []
    for index, row in enumerate(rows):
        key = -xxhash.xxh3_64_intdigest(f"{seed}:{index}".encode())
        if len(chosen) < count:
            heapq.heappush(chosen, (key, index, row))
        elif key > chosen[0][0]:
            heapq.heapreplace(chosen, (key, index, row))
    yield from (row for _, _, row in sorted(chosen, key=lambda entry: entry[1]))


def all_text(sample: Sample) -> str:
    if isinstance(sample, Conversation):
        return "\n".join([m["content"] for m in sample.messages])
    if isinstance(sample, Text):
        return sample.text
    answers = sample.chosen + sample.rejected if isinstance(sample, Preference) else sample.completion
    return "\n".join([m["content"] for m in [*sample.prompt, *answers]])


def prompt_text(sample: Sample) -> str:
    """What the model is asked: the texts of all turns that are not its own."""
    if isinstance(sample, Text):
        return sample.text
    messages = sample.messages if isinstance(sample, Conversation) else sample.prompt
    return "\x1e".join([m["content"] for m in messages if m["role"] != "assistant"])


def question(sample: Sample) -> str:
    """The user's first turn without case, spacing, width and closing punctuation: equal for what is the same question,
    whatever the system turn says and however far the conversation goes on."""
    if isinstance(sample, Text):
        text = sample.text
    else:
        messages = sample.messages if isinstance(sample, Conversation) else sample.prompt
        first = next((m["content"] for m in messages if m["role"] == "user"), None)
        text = prompt_text(sample) if first is None else first
    return folded(text)


def questions(sample: Sample) -> str:
    """All turns of the user, likewise; "" where there are none."""
    if isinstance(sample, Text):
        return ""
    messages = sample.messages if isinstance(sample, Conversation) else sample.prompt
    return "\x1e".join([folded(m["content"]) for m in messages if m["role"] == "user"])


def folded(text: str) -> str:
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    short = "".join(text.casefold().split())
    return short.rstrip(".!?。…") or short


def content_hash(sample: Sample) -> int:
    """64 bits over the question, the same on every machine; equal questions fall on the same side of a split."""
    return xxhash.xxh3_64_intdigest(question(sample).encode("utf-8", "surrogatepass"))


def identity(sample: Sample) -> int:
    """64 bits over everything that is trained on; equal for duplicates. Only for one run (Python's own hash)."""
    if isinstance(sample, Conversation):
        if not sample.tools and is_plain(sample.messages):
            return hash(tuple([m["content"] for m in sample.messages]))
        return hash(repr((sample.messages, sample.tools)))
    if isinstance(sample, Text):
        return hash(sample.text)
    if isinstance(sample, Preference):
        return hash(repr((sample.prompt, sample.chosen, sample.rejected)))
    assert isinstance(sample, Unpaired)
    return hash(repr((sample.prompt, sample.completion, sample.label)))
