"""The order of samples: a function of (seed, epoch) alone, so that a resumed run sees the same batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler


class SharedBatches(Sampler[list[int]]):
    """Batches for several processes in turn: batch k goes to process k % `processes`.

    So many of them together are the rows that one process would take in as many passes of `size`; an epoch's last rows
    are shared out evenly, and a process for which there is none takes a spare one (`Spared`), which does not count.
    """

    def __init__(self, order: Sampler[int], size: int, processes: int) -> None:
        self.sampler, self.size, self.processes = order, size, processes  # accelerate tells `sampler` the epoch

    def __len__(self) -> int:
        return math.ceil(len(self.sampler) / (self.size * self.processes)) * self.processes  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        rows, each = list(self.sampler), self.size * self.processes
        for start in range(0, len(rows), each):
            part = rows[start : start + each]
            least, more = divmod(len(part), self.processes)
            sizes = [self.size] * self.processes
            if len(part) < each:
                sizes = [least + (number < more) for number in range(self.processes)]
            for size in sizes:
                yield part[:size] or [-1 - rows[start]]
                part = part[size:]


class Spared:
    """Rows, of which -1 - i is row i as a spare one."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return dict(self.rows[number]) if number >= 0 else {**self.rows[-1 - number], "spare": True}


class OrderedSampler(Sampler[int]):
    """A shuffled order that depends on (seed, epoch) only; with `group` > 1, samples of like length stand together.

    transformers' LengthGroupedSampler draws from the global generator, so a resumed second epoch sees other batches.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int = 1, shuffle: bool = True) -> None:
        self.lengths, self.seed, self.group, self.shuffle, self.epoch = lengths, seed, group, shuffle, 0

    def set_epoch(self, epoch: int) -> None:  # called by accelerate at the start of each epoch
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if not self.shuffle:
            return iter(range(len(self.lengths)))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if self.group > 1:
            window = self.group * 50  # sorted within windows: batches stay random, padding small
            batches: list[list[int]] = []
            for start in range(0, len(order), window):
                part = sorted(order[start : start + window], key=lambda i: -self.lengths[i])
                batches += [part[i : i + self.group] for i in range(0, len(part), self.group)]
            last = batches.pop() if len(batches[-1]) < self.group else []  # the short batch stays last
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            order = [i for b in shuffled for i in batches[b]] + last
        return iter(order)
