"""The order of samples: of (seed, epoch) alone, and of like length where that is asked for."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import torch

from finetune.training.sampler import OrderedSampler

ORDERS = [[4, 1, 6, 3, 5, 7, 2, 0], [5, 6, 7, 3, 0, 2, 4, 1]]
"""Of 8 rows in the epochs 0 and 1 under seed 42."""


def order(lengths: list[int], epoch: int = 0, **more: Any) -> list[int]:
    sampler = OrderedSampler(lengths, **{"seed": 42, **more})
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def test_every_epoch_has_an_order_of_its_own() -> None:
    orders = [order([1] * 40, epoch) for epoch in range(3)] + [order([1] * 40, seed=43)]
    assert all(sorted(found) == list(range(40)) for found in orders)
    assert len({tuple(found) for found in orders}) == 4
    assert order([1] * 40, shuffle=False) == list(range(40))


def test_an_order_needs_no_history() -> None:
    """A resumed run begins in its second epoch; runs that were stopped go on with the order that they began with."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert order([1] * 8) == ORDERS[0]
    assert order([1] * 8, epoch=1) == ORDERS[1]
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn from the generator of all"


def test_rows_of_like_length_stand_together() -> None:
    """In batches of 4 out of windows of 200; the batches in any order, the short one last."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(403)]
    found = [order(lengths, epoch, group=4) for epoch in (0, 1)]
    parts = [{frozenset(one[at : at + 4]) for at in range(0, 403, 4)} for one in found]
    assert len(parts[0] & parts[1]) < 10, "other windows, so other batches in every epoch"
    for one in found:
        assert sorted(one) == list(range(403))
        sizes = [[lengths[i] for i in one[at : at + 4]] for at in range(0, 403, 4)]
        assert [len(batch) for batch in sizes] == [4] * 100 + [3]
        spread = sum(max(batch) - min(batch) for batch in sizes) / len(sizes)
        assert spread < 25, "1000 / 50 batches of a window; some 600 where they are not sorted"
        falls = sum(max(a) > max(b) for a, b in pairwise(sizes))
        assert 30 < falls < 70, "long and short batches take turns"
