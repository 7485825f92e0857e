"""Raw text for pre-training: documents from any source, packed into blocks of equal length.

documents(data, blocks)    -> the texts of `data.train`; `builtin:world` is endless
pack(documents, …)         -> blocks of exactly max_length tokens
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np

from finetune.data import formats, samples, sources
from finetune.data.dataset import times_used
from finetune.data.samples import content_hash
from finetune.data.types import RowProblem, Text
from finetune.errors import UserError
from finetune.recipe import DataConfig, SourceConfig

WORLD = "builtin:world"
Encode = Callable[[str], list[int]]


def is_endless(data: DataConfig) -> bool:
    return WORLD in (data.train if isinstance(data.train, list) else [data.train])


def documents(data: DataConfig, seed: int, total: int) -> Iterator[str]:
    """The texts of all sources, in order. `builtin:world` draws from `seed`, its curriculum over `total` documents."""
    for source in data.train if isinstance(data.train, list) else [data.train]:
        if source == WORLD:
            from finetune.data import world

            yield from world.documents(seed, total)
        else:
            weight = sources.as_dict(source).get("weight", 1.0)
            for passed in range(math.ceil(weight)):  # a whole pass after the other: the order of the text stays
                for text in _texts(source, data):
                    if weight >= passed + 1 or _times(text, weight) > passed:
                        yield text


def _times(text: str, weight: float) -> int:
    """How often the weight of its source uses a text, as in every stage."""
    return int(times_used(np.asarray([content_hash(Text(text))], np.uint64), np.asarray([weight]))[0])


def _texts(source: str | SourceConfig, data: DataConfig) -> Iterator[str]:
    """Rows of raw text (a `text` column, or a text file). UserError for rows of another kind."""
    rows = sources.read_rows(source)
    first = list(islice(rows, 100))
    name = data.format or formats.detect((row.data for row in first if row.problem is None), data.columns)
    if formats.FORMATS[name].kind != "text":
        fix = "give rows with a `text` column, or fine-tune with `ft sft`"
        raise UserError(
            f"rows of format {name} are not raw text",
            path=str(getattr(source, "path", source)),
            key="data.train",
            fix=fix,
        )
    for row in islice(chain(first, rows), data.max_samples):
        try:
            if row.problem is not None:
                raise row.problem
            found = formats.convert_all(row.data, name, data.columns)
        except RowProblem as problem:
            if data.on_error == "stop" or problem.ends_file:
                raise UserError(problem.message, path=row.file, row=row.row, fix=problem.fix) from None
            continue
        for sample in found:
            yield sample.text


def pack(texts: Iterable[str], encode: Encode, length: int, separator: Sequence[int]) -> Iterator[list[int]]:
    """Blocks of exactly `length` ids; every document is preceded by `separator`.

    A document that is cut by the end of a block stands whole at the start of the next one if it fits there, so that no
    block begins with a rest whose beginning is missing; only longer ones are continued. The last block may be dropped.
    """
    block: list[int] = []
    for text in texts:
        ids = [*separator, *encode(text)]
        room = length - len(block)
        block += ids[:room]
        if len(block) < length:
            continue
        yield block
        rest = ids if room < len(ids) <= length else ids[room:]
        while len(rest) >= length:
            yield rest[:length]
            rest = rest[length:]
        block = list(rest)


def held_out(texts: Iterable[str], share: float | int) -> tuple[list[str], Iterator[str]]:
    """(held-out texts, the others) of a text stream. A share is drawn by content hash among the first 10,000 texts,
    a number is taken from them likewise; the same text, up to case and spacing, always falls on the same side."""
    stream = iter(texts)
    first = list(islice(stream, 10_000))
    count = share if isinstance(share, int) else max(1, round(share * len(first)))
    keys = [samples.question(Text(text)) for text in first]
    order = sorted(range(len(first)), key=lambda i: zlib.crc32(keys[i].encode("utf-8", "surrogatepass")))
    held = {keys[i] for i in order[: min(count, len(first) // 2)]}
    rest = (text for text in chain(first, stream) if samples.question(Text(text)) not in held)
    return [text for text, key in zip(first, keys, strict=True) if key in held], rest
