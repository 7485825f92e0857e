"""Raw text for pre-training: documents from any source, packed into blocks of equal length.

The text is a stream: with max_steps no more is read than is trained on. Its order is kept (a curriculum stays one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from finetune.data.audit import Audit
from finetune.data.offsets import check_embedded
from finetune.data.rows import Rows, eval_mask, times_used
from finetune.data.samples import watched
from finetune.data.types import Text
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig
from finetune.terminal.progress import task

WORLD = "builtin:world"
EVAL_SEED = 1_000_003  # added to the seed: the held-out text of the endless built-in world
SPLIT_AMONG = 10_000  # texts of a stream among which some are chosen to be held out


class Blocks:
    """A torch dataset over one tensor `ids` (blocks, max_length); every token is a label."""

    def __init__(self, blocks: Sequence[list[int]]) -> None:
        import torch

        self.ids = torch.tensor(blocks, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


def load_blocks(
    config: DataConfig, tokenizer: Any, *, seed: int = 42, eval_data: Any = None, wanted: int | None = None,
    is_new: bool = False,
) -> Rows:  # fmt: skip
    """Blocks of `data.train`, split by `data.eval_split` text by text. UserError with every problem of every row, and
    for texts that do not fill a block.

    Args:
        eval_data: held-out rows, only looked at for leakage.
        wanted: the number of training blocks, all that the text fills when None.
        is_new: the model will have an embedding for every token of this tokenizer.
    """
    length, before = config.max_length, separator(tokenizer)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        if not is_new:
            check_embedded(tokenizer, ids)
        return ids

    def packed(texts: Iterable[str]) -> Iterator[list[int]]:
        return pack(texts, encode, length, before)

    counts: dict[str, int] = {"rows": 0, "dropped": 0}
    warnings: list[str] = []
    seen: dict[str, Any] = {}
    if is_endless(config):
        blocks, held = _of_world(config, packed, seed, wanted)
        counts["rows"] = len(blocks)
    else:
        audit = Audit(config, None, "text", eval_data)
        kept, texts = split(watched(documents(config, seed, 1, audit), config), config.eval_split)
        blocks, held = list(islice(packed(texts), wanted)), list(packed(kept))
        audit.settle()
        counts, warnings, seen = dict(audit.counts), audit.warnings(), audit.seen()
    if not blocks:
        what = f"the text does not fill one block of {length} tokens"
        fix = "give more text or a smaller data.max_length"
        raise UserError(what, path=str(config.train), key="data.max_length", fix=fix)
    if config.eval_split is not None and not held:
        what = f"the texts held out do not fill one block of {length} tokens"
        raise UserError(what, key="data.eval_split", fix="hold out more, or leave it out")
    counts |= {"blocks": len(blocks), "trained_tokens": len(blocks) * (length - 1)}
    return Rows(Blocks(blocks), Blocks(held) if held else None, counts, warnings, seen=seen)


def _of_world(
    config: DataConfig, packed: Callable[[Iterable[str]], Iterator[list[int]]], seed: int, wanted: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """(training blocks, held-out blocks) of the endless text."""
    if wanted is None:
        raise UserError(f"{WORLD} is endless", key="train.max_steps", fix="set a number of steps")
    if isinstance(config.eval_split, float):
        raise UserError(f"{WORLD} is endless", key="data.eval_split", fix="give a number of blocks, not a share")
    blocks = []
    with task("making", wanted, "blocks of text") as advance:
        total = _documents_for(wanted, packed, documents(config, seed, 1))
        for block in islice(packed(documents(config, seed, total)), wanted):
            blocks.append(block)
            advance(1)
    return blocks, list(islice(packed(documents(config, seed + EVAL_SEED, 1)), config.eval_split or 0))


def _documents_for(blocks: int, packed: Callable[[Iterable[str]], Iterator[list[int]]], texts: Iterator[str]) -> int:
    """How many documents of the endless world fill `blocks` blocks, measured on a thousandth of them."""
    used = 0

    def drawn() -> Iterator[str]:
        nonlocal used
        for text in texts:
            used += 1
            yield text

    found = len(list(islice(packed(drawn()), max(50, blocks // 1000))))
    return blocks * used // found


def is_endless(config: DataConfig) -> bool:
    """Whether the text is `builtin:world`. UserError for it beside others, which would never be reached."""
    listed = config.train if isinstance(config.train, list) else [config.train]
    if WORLD in listed and len(listed) > 1:
        raise UserError(f"{WORLD} is endless: no other source would be read", key="data.train", fix="name one of them")
    return WORLD in listed


def documents(config: DataConfig, seed: int, total: int, audit: Audit | None = None) -> Iterator[str]:
    """The texts of all sources, in order. `builtin:world` draws from `seed`, its curriculum over `total` documents.

    A source of a weight above 1 is read again after all others, so that no document stands beside itself.

    Args:
        audit: notes the rows that cannot be used; whoever gives it calls `settle` once the texts are read.
    """
    if is_endless(config):
        from finetune.builtin import world

        yield from world.documents(seed, total)
        return
    pass_over = Audit(config, None, "text") if audit is None else audit
    again: list[tuple[str, int]] = []
    for item, _ in pass_over.rows(seed):
        assert isinstance(item.sample, Text)
        times = 1 if item.weight == 1 else int(times_used(hashes([item.sample.text]), np.asarray([item.weight]))[0])
        if times:
            yield item.sample.text
        if times > 1:
            again.append((item.sample.text, times - 1))
    if audit is None:
        pass_over.settle()
    while again:
        yield from (text for text, _ in again)
        again = [(text, times - 1) for text, times in again if times > 1]


def hashes(texts: Sequence[str]) -> np.ndarray:
    return np.asarray([Text(text).content_hash for text in texts], np.uint64)


def separator(tokenizer: Any) -> list[int]:
    """What stands before every document: what the tokenizer puts before any text, else its bos, else its end token."""
    before: list[int] = tokenizer.encode("")
    one = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [i for i in before if i in tokenizer.all_special_ids] or [one]


def pack(
    texts: Iterable[str], encode: Callable[[str], list[int]], length: int, separator: Sequence[int], rest: bool = False
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


def split(texts: Iterable[str], share: float | int | None) -> tuple[list[str], Iterator[str]]:
    """(held-out texts, the others): chosen by content among the first 10,000, as in every stage; the same text, up to
    case and spacing, always falls on the same side."""
    stream = iter(texts)
    if not share:
        return [], stream
    first = list(islice(stream, SPLIT_AMONG))
    marks = hashes(first)
    mask = eval_mask(marks, share)
    if mask.all():
        what = f"every text is held out: {share:g} of {len(first):,}"
        raise UserError(what, key="data.eval_split", fix="hold out fewer texts, or leave it out")
    held = set(marks[mask].tolist())
    kept = [text for text, mark in zip(first, marks.tolist(), strict=True) if mark in held]
    return kept, (text for text in chain(first, stream) if Text(text).content_hash not in held)
