"""Raw text for pre-training: documents from any source, packed into blocks of equal length.

documents(data, blocks)    -> the texts of `data.train`; `builtin:world` is endless
pack(documents, …)         -> blocks of exactly max_length tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from finetune.data.audit import Audit
from finetune.errors import UserError
from finetune.recipe import DataConfig

WORLD = "builtin:world"
Encode = Callable[[str], list[int]]


def is_endless(data: DataConfig) -> bool:
    """Whether the text is `builtin:world`. UserError for it beside others, which would never be reached."""
    listed = data.train if isinstance(data.train, list) else [data.train]
    if WORLD in listed and len(listed) > 1:
        raise UserError(f"{WORLD} is endless: no other source would be read", key="data.train", fix="name one of them")
    return WORLD in listed


def documents(data: DataConfig, seed: int, total: int, audit: Audit | None = None) -> Iterator[str]:
    """The texts of all sources, in order. `builtin:world` draws from `seed`, its curriculum over `total` documents.

    Args:
        audit: notes the rows that cannot be used; whoever gives it calls `settle` once the texts are read.
    """
    if is_endless(data):
        from finetune.data import world

        yield from world.documents(seed, total)
        return
    pass_over = Audit(data, None, "text") if audit is None else audit
    for item, _ in pass_over.rows(seed):
        yield item.sample.text  # type: ignore[union-attr]
    if audit is None:
        pass_over.settle()


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
    a number is taken from them likewise; the same text always falls on the same side."""
    stream = iter(texts)
    first = list(islice(stream, 10_000))
    count = share if isinstance(share, int) else max(1, round(share * len(first)))
    chosen = sorted(range(len(first)), key=lambda i: zlib.crc32(first[i].encode()))[: min(count, len(first) // 2)]
    held = {first[i] for i in chosen}
    return [text for text in first if text in held], (text for text in chain(first, stream) if text not in held)
