"""Raw text for pre-training: documents from any source, packed into blocks of equal length.

documents(data, blocks)    -> the texts of `data.train`; `builtin:world` is endless
pack(documents, …)         -> blocks of exactly max_length tokens
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from finetune.data import samples
from finetune.data.audit import Audit
from finetune.data.conversations import times_used
from finetune.data.samples import content_hash
from finetune.data.types import Text
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

WORLD = "builtin:world"
EVAL_SEED = 1_000_003  # added to the seed: the held-out text of the endless built-in world
Encode = Callable[[str], list[int]]


def is_endless(data: DataConfig) -> bool:
    """Whether the text is `builtin:world`. UserError for it beside others, which would never be reached."""
    listed = data.train if isinstance(data.train, list) else [data.train]
    if WORLD in listed and len(listed) > 1:
        raise UserError(f"{WORLD} is endless: no other source would be read", key="data.train", fix="name one of them")
    return WORLD in listed


def documents(data: DataConfig, seed: int, total: int, audit: Audit | None = None) -> Iterator[str]:
    """The texts of all sources, in order. `builtin:world` draws from `seed`, its curriculum over `total` documents.

    A source of a weight above 1 is read again after all others, so that no document stands beside itself.

    Args:
        audit: notes the rows that cannot be used; whoever gives it calls `settle` once the texts are read.
    """
    if is_endless(data):
        from finetune.builtin import world

        yield from world.documents(seed, total)
        return
    pass_over = Audit(data, None, "text") if audit is None else audit
    again: list[tuple[str, int]] = []
    for item, _ in pass_over.rows(seed):
        text = item.sample.text  # type: ignore[union-attr]
        times = _times(text, item.weight)
        if times:
            yield text
        if times > 1:
            again.append((text, times - 1))
    if audit is None:
        pass_over.settle()
    while again:
        yield from (text for text, _ in again)
        again = [(text, times - 1) for text, times in again if times > 1]


def _times(text: str, weight: float) -> int:
    """How often the weight of its source uses a text, as in every stage."""
    if weight == 1:
        return 1
    return int(times_used(np.asarray([content_hash(Text(text))], np.uint64), np.asarray([weight]))[0])


def separator(tokenizer: Any) -> list[int]:
    """What stands before every document: what the tokenizer puts before any text, else its bos, else its end token."""
    before: list[int] = tokenizer.encode("")
    one = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [i for i in before if i in tokenizer.all_special_ids] or [one]


def pack(
    texts: Iterable[str], encode: Encode, length: int, separator: Sequence[int], rest: bool = False
) -> Iterator[list[int]]:
    """Blocks of exactly `length` ids; every document is preceded by `separator`.

    A document that is cut by the end of a block stands whole at the start of the next one if it fits there, so that no
    block begins with a rest whose beginning is missing; only longer ones are continued. What does not fill the last
    block is left out, or with `rest` a shorter block.
    """
    block: list[int] = []
    for text in texts:
        ids = [*separator, *encode(text)]
        room = length - len(block)
        block += ids[:room]
        if len(block) < length:
            continue
        yield block
        more = ids if room < len(ids) <= length else ids[room:]
        while len(more) >= length:
            yield more[:length]
            more = more[length:]
        block = list(more)
    if rest and len(block) > 1:  # the first token of a row is predicted from nothing
        yield block


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
