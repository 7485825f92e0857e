"""What `ft eval` and `ft compare` measure on.

named(path, config)      a file's rows, of whatever kind they are
split_off(recipe, …)     the rows that data.eval_split held out of a run, found by the code that held them out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from finetune.data import sources
from finetune.data import text as raw
from finetune.data.audit import Audit
from finetune.data.conversations import HeldRow, held_out, held_row, load_held_out, watched
from finetune.data.samples import Item, content_hash
from finetune.data.types import Conversation, Preference, Sample, Text, Unpaired
from finetune.errors import UserError
from finetune.terminal.progress import note

KINDS: dict[type, str] = {Conversation: "answers", Preference: "pairs", Unpaired: "unpaired", Text: "text"}
SPLIT = "data.eval_split"


@dataclass(frozen=True)
class HeldOut:
    name: str
    """The file, or data.eval_split."""
    rows: list[HeldRow]
    hashes: frozenset[int] | None = None
    """Of all rows that data.eval_split holds out."""
    blocks: int | None = None
    """Of text: only so many of the blocks that it fills."""

    @property
    def kind(self) -> str:
        """answers, pairs, unpaired or text"""
        return KINDS[type(self.rows[0].sample)]

    @property
    def samples(self) -> list[Sample]:
        return [row.sample for row in self.rows]


def named(path: str, config: Any, limit: int | None) -> HeldOut:
    """The rows of a file; of a dataset folder those of its validation or test split, which is said."""
    if split := sources.held_out(path).get("split"):
        note(f"{path}: its {split} split")
    return HeldOut(path, load_held_out(path, config)[:limit])


def split_off(recipe: Any, encoder: Any, limit: int | None) -> HeldOut:
    """The rows that training leaves out by `data.eval_split`. UserError when there are none.

    encoder: that of the run; rows that it cannot encode, or that max_length leaves out, are held out nowhere. None for
    raw text.
    """
    data, seed = recipe.data, recipe.train.seed
    if recipe.stage == "pretrain":
        found = texts_split_off(data, seed)
        return HeldOut(SPLIT, found.rows[:limit], found.hashes, found.blocks)
    if recipe.stage == "reward":  # as its rows are read to be scored
        data = data.model_copy(update={"train_on": "last"})
    kind = {"sft": "sft", "dpo": "preference", "reward": "preference", "kto": "unpaired"}[recipe.stage]
    audit = Audit(data, encoder, kind)
    kept: list[tuple[int, Item]] = []
    for item, _ in watched(audit.rows(seed), data, "reading"):
        assert item.sample is not None
        kept.append((content_hash(item.sample), item))
        if len(kept) >= 2 * MANY:  # what is not held out of these is not held out of more
            kept = lowest(kept, data.eval_split)
    audit.settle()
    kept = lowest(kept, data.eval_split)
    if not kept:
        raise UserError("no row was held out", key=SPLIT, fix="give --data FILE")
    rows = [held_row(item, data.columns) for _, item in kept]
    return HeldOut(SPLIT, rows[:limit], frozenset(mark for mark, _ in kept))


MANY = 50_000


def lowest(marked: Sequence[tuple[int, Item]], share: float | int | None) -> list[tuple[int, Item]]:
    held = held_out(np.asarray([mark for mark, _ in marked], np.uint64), share)
    return [pair for pair, kept in zip(marked, held, strict=True) if kept]


def texts_split_off(data: Any, seed: int) -> HeldOut:
    if raw.is_endless(data):
        texts = list(islice(raw.documents(data, seed + raw.EVAL_SEED, 1), data.eval_split * data.max_length))
        return HeldOut(SPLIT, [HeldRow(raw.WORLD, i, Text(t)) for i, t in enumerate(texts, 1)], blocks=data.eval_split)
    audit = Audit(data, None, "text")
    kept, others = raw.held_out(raw.documents(data, seed, 1, audit), data.eval_split)
    for _ in others:
        pass
    audit.settle()
    rows = [HeldRow(str(data.train), i, Text(text)) for i, text in enumerate(kept, 1)]
    return HeldOut(SPLIT, rows, frozenset(content_hash(row.sample) for row in rows))
