"""One source of the recipe -> its samples, each with its place; nothing is lost silently.

Formats are recognised per source from its first rows. Training data, audit, preview and evaluation all read through
here.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from finetune.data import formats, sources
from finetune.data.nulls import filled, without_nulls
from finetune.data.types import Row, RowProblem, Sample
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig, SourceConfig
from finetune.recipe.stages import ROWS
from finetune.terminal.progress import shown_name, task

SNIFFED = 100
R = TypeVar("R")
STAGES = {kind: " or ".join(sorted(f"ft {s}" for s, k in ROWS.items() if k == kind)) for kind in ROWS.values()}


class Item(NamedTuple):
    """A sample, or why there is none, with its place."""

    file: str
    row: int
    sample: Sample | None
    problem: RowProblem | None = None
    weight: float = 1.0
    data: dict[str, Any] = {}  # noqa: RUF012 (the row as read, never written to)

    @property
    def usable(self) -> Sample:
        """The sample of a row that has one."""
        assert self.sample is not None
        return self.sample


def specs(config: DataConfig) -> list[dict[str, Any]]:
    return sources.as_dicts(config.train)


def watched(rows: Iterator[R], config: DataConfig, what: str = "tokenising") -> Iterator[R]:
    """The rows of a data section, with a line that counts them."""
    total, name = expected_rows(config), named(config)
    with task(f"{what} {name}") if total is None else task(what, total, f"rows of {name}") as advance:
        for row in rows:
            advance(1)
            yield row


def named(config: DataConfig) -> str:
    names = [shown_name(str(spec["path"])) for spec in specs(config)]
    return ", ".join([*names[:2], *("…" for _ in names[2:3])])


COUNTED = {".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".text"}


def expected_rows(config: DataConfig) -> int | None:
    """About how many rows the sources hold, by their lines; None where that says nothing or would take long."""
    if config.text_unit != "line":
        return None
    total = 0
    for spec in specs(config):
        limit = spec.get("max_samples") or config.max_samples
        files = sources.local_files([spec]) or []
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


def held_out_section(spec: Any, config: DataConfig | None = None) -> DataConfig:
    """Held-out rows as a data section."""
    return section_of([sources.held_out(one) for one in sources.as_dicts(spec)], config)


def section_of(listed: list[dict[str, Any]], config: DataConfig | None = None) -> DataConfig:
    """Sources as a data section: of the training rows' settings, names of columns, what a document is and the length
    hold for them, too."""
    kept = {} if config is None else config.model_dump(include={"columns", "text_unit", "max_length"})
    return DataConfig(train=[SourceConfig(**one) for one in listed], **kept)


def read_samples(spec: sources.Spec, config: DataConfig, kind: str | None = "sft", *, seed: int = 42) -> Iterator[Item]:
    """All samples of one source in order; unreadable and unconvertible rows as items with a problem.

    kind: what the stage needs (sft, preference, unpaired, text), None for anything. UserError when the source does not
    exist, when no format recognises its rows, or when they are of another kind.
    """
    spec = sources.as_dict(spec)
    columns = spec.get("columns") or config.columns
    weight = float(spec.get("weight", 1.0))
    rows = sources.read_rows(spec, streaming=config.streaming, unit=config.text_unit)
    head = list(itertools.islice(rows, SNIFFED))
    name = checked_format(spec.get("format") or config.format, head, columns, kind, str(spec["path"]))
    exported = filled(row.data for row in head)
    limit = spec.get("max_samples") or config.max_samples
    everything: Iterator[Row] = itertools.chain(head, rows)
    if limit is not None:
        everything = drawn(everything, limit, seed) if config.shuffle else itertools.islice(everything, limit)
    convert = formats.FORMATS[name].convert
    for row in everything:
        data, file, number, problem = row
        if problem is None:
            try:
                if exported:
                    data = without_nulls(data)
                samples: Sequence[Sample] = convert(formats.shaped(data, columns))
                if kind == "unpaired":
                    samples = [half for sample in samples for half in sample.apart()]
                for sample in samples:
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
        readable = [row.data for row in head if row.problem is None]
        if not readable:
            return "text" if kind == "text" else "messages"  # nothing readable: every row carries its own problem
        try:
            name = formats.detect(readable, columns)
        except UserError as error:
            raise UserError(error.problems[0].message, path=path, fix=error.problems[0].fix) from None
    if name not in formats.FORMATS:
        raise UserError(f"unknown format {name!r}", key="data.format", fix=f"use one of {', '.join(formats.FORMATS)}")
    found = formats.FORMATS[name].kind
    if kind is not None and found != kind and (kind, found) != ("unpaired", "preference"):
        what = f"the rows are {found} data ({name}), but this stage needs {kind} data"
        raise UserError(what, path=path, fix=f"use {STAGES[found]}, or set data.format")
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
