"""What every loader returns, and which rows are held out or repeated."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.audit import Audit, Encoding
from finetune.data.samples import Item, watched
from finetune.errors import UserError


class Places:
    """(file, row) of samples, eight bytes each."""

    def __init__(self, files: Sequence[str] = (), file: Any = None, row: Any = None) -> None:
        self.files = {name: number for number, name in enumerate(files)}
        self.file = array("I") if file is None else file
        self.row = array("I") if row is None else row

    def add(self, file: str, row: int) -> None:
        self.file.append(self.files.setdefault(file, len(self.files)))
        self.row.append(row)

    def picked(self, numbers: np.ndarray) -> Places:
        """Those of these samples."""
        columns = (np.asarray(column, np.uint32)[numbers] for column in (self.file, self.row))
        return Places(list(self.files), *columns)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, number: int) -> tuple[str, int]:
        return list(self.files)[int(self.file[number])], int(self.row[number])


@dataclass
class Rows:
    train: Any
    """A datasets.Dataset, or for prompts and text a list."""
    eval: Any | None
    """The rows held out by eval_split."""
    counts: dict[str, int]
    """rows, used, dropped, truncated, cut_away, duplicates, leaked, tokens, trained_tokens, eval_rows, …"""
    warnings: list[str] = field(default_factory=list)
    """One line per kind of thing that was found and did not stop the run."""
    places: Places = field(default_factory=Places)
    """Of the rows to train on; none of blocks of text."""
    seen: dict[str, Any] = field(default_factory=dict)
    """What the rows are like: `Audit.seen`."""


def gathered(
    audit: Audit, seed: int, convert: Callable[[Item, Encoding], Any]
) -> tuple[list[Any], np.ndarray, np.ndarray, Places]:
    """What `convert` makes of every usable row (None for none), content hashes, weights of the rows' sources, and
    places. UserError with every problem of every row."""
    rows, hashes, weights, places = [], array("Q"), array("d"), Places()
    for item, encoded in watched(audit.rows(seed), audit.config):
        row = convert(item, encoded)
        if row is not None:
            rows.append(row)
            hashes.append(item.usable.content_hash)
            weights.append(item.weight)
            places.add(item.file, item.row)
    audit.settle()
    return rows, np.asarray(hashes, np.uint64), np.asarray(weights), places


def divided(
    pick: Callable[[np.ndarray], Any], hashes: np.ndarray, weights: np.ndarray, share: float | int | None,
    counts: dict[str, int], warnings: list[str], places: Places, seen: dict[str, Any],
) -> Rows:  # fmt: skip
    """Hold rows out and repeat those of weighted sources; `pick` gives the rows of these numbers. UserError when none
    is left."""
    held, times = eval_mask(hashes, share), times_used(hashes, weights)
    times[held] = 0
    if len(held) and held.all():
        what = f"every row is held out: {share:g} of {len(held):,}, and rows with one question stay together"
        raise UserError(what, key="data.eval_split", fix="hold out fewer rows, or leave it out")
    if not times.any():
        raise UserError("no row is left to train on", key="data.train", fix="give more rows, or hold out fewer")
    numbers = np.repeat(np.arange(len(times)), times)
    return Rows(
        pick(numbers),
        pick(np.flatnonzero(held)) if held.any() else None,
        {**counts, "eval_rows": int(held.sum())},
        [*warnings, *uneven(held, share)],
        places.picked(numbers),
        seen,
    )


def eval_mask(hashes: np.ndarray, share: float | int | None) -> np.ndarray:
    """Which rows are held out: by hash alone, so more data never moves a row; a number takes the lowest hashes, and so
    does a share of so few rows that it would take none."""
    if not share or not len(hashes):
        return np.zeros(len(hashes), bool)
    if isinstance(share, float):
        return hashes < max(np.uint64(share * 2**64), np.sort(hashes)[0] + np.uint64(1))  # one row at least
    limit = np.sort(hashes)[min(share, len(hashes)) - 1]
    return hashes <= limit


def uneven(held: np.ndarray, share: float | int | None) -> list[str]:
    """A warning where much more or less was held out than was asked."""
    if not share or not len(held):
        return []
    wanted, got = share * len(held) if isinstance(share, float) else share, int(held.sum())
    if got and abs(got - wanted) <= 5 * max(1.0, wanted) ** 0.5:
        return []
    return [f"data.eval_split holds out {got:,} of {len(held):,} rows: rows with the same first question stay together"]


def times_used(hashes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often each row is used: weight 2.5 is twice, and for half of the rows, by hash, once more."""
    whole = np.floor(weights).astype(np.int64)
    order = np.argsort(hashes, kind="stable")
    again = np.empty(len(hashes), np.uint64)  # 0, 1, 2, … for the rows of one question, which differ in this
    again[order] = np.arange(len(hashes)) - np.searchsorted(hashes[order], hashes[order], "left")
    mixed = ((hashes + again) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)  # not the bits that hold rows out
    return whole + (mixed / 2.0**53 < weights - whole)
