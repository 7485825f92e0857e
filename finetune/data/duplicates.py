"""Rows that stand twice in the data, at 20 bytes a row."""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

Place = tuple[str, int]
"""File and row."""


class Duplicates:
    def __init__(self) -> None:
        self.fingerprints, self.file_numbers, self.rows = array("q"), array("I"), array("I")
        self.files: list[str] = []

    def add(self, items: Sequence[Any]) -> None:
        """A batch of samples.Item, which spares calls for every row."""
        self.fingerprints.extend([item.sample.fingerprint() for item in items])
        self.rows.extend([item.row for item in items])
        for file, group in itertools.groupby(items, operator.attrgetter("file")):
            if not self.files or self.files[-1] != file:
                self.files.append(file)
            self.file_numbers.extend([len(self.files) - 1 for _ in group])

    def found(self) -> list[tuple[Place, Place]]:
        """(a repeated row, the first like it), in order."""
        keys = np.frombuffer(self.fingerprints, np.int64) if self.rows else np.empty(0, np.int64)
        order = np.argsort(keys, kind="stable")
        found: list[tuple[int, Place, Place]] = []
        first: dict[int, int] = {}
        for at in np.flatnonzero(np.diff(keys[order]) == 0).tolist():
            head = first.setdefault(int(keys[order[at]]), int(order[at]))
            again = int(order[at + 1])
            if self._place(again) != self._place(head):  # several samples of one row may well be alike
                found.append((again, self._place(again), self._place(head)))
        return [(again, head) for _, again, head in sorted(found)]

    def _place(self, number: int) -> Place:
        return self.files[self.file_numbers[number]], self.rows[number]
