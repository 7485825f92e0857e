"""Rollouts of several processes: each answers, scores and learns from its rows of every minibatch, and all know all.

A rollout is small beside the model: its replies, log-probabilities and values are brought together once, so advantages
are whitened over all of them, and the sum of the processes' gradients is the gradient of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from finetune import ranks
from finetune.rl.replies import Support


def own(index: torch.Tensor) -> torch.Tensor:
    """This process's rows of a minibatch."""
    return index.tensor_split(ranks.count())[ranks.rank()]


def numbers(rank: int, rows: int, minibatch: int) -> list[int]:
    """Of the rows of a process, in a rollout of `rows`."""
    parts = (part.tensor_split(ranks.count())[rank] for part in torch.arange(rows).split(minibatch))
    return torch.cat([*parts]).tolist()


def listed(mine: Sequence[Any], rows: int, minibatch: int) -> list[Any]:
    """What each process has of its rows, in the order of all."""
    if ranks.count() == 1:
        return list(mine)
    found: list[Any] = [None] * rows
    for rank, theirs in enumerate(ranks.each(list(mine))):
        for number, value in zip(numbers(rank, rows, minibatch), theirs, strict=True):
            found[number] = value
    return found


def stacked(mine: torch.Tensor, rows: int, minibatch: int) -> torch.Tensor:
    """The same of tensors, [rows here, T] -> [rows, T]."""
    if ranks.count() == 1:
        return mine
    return torch.stack(listed([*mine.cpu()], rows, minibatch)).to(mine.device)


def supported(mine: Support | None, rows: int, minibatch: int) -> Support | None:
    if mine is None or ranks.count() == 1:
        return mine
    ids = listed([part.cpu() for part in mine.ids], rows, minibatch)
    return Support([part.to(mine.counts.device) for part in ids], stacked(mine.counts, rows, minibatch))


def add_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Each process has the sum over all of them."""
    if ranks.count() == 1:
        return
    import torch.distributed as dist

    trained = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    with ranks.broken():
        dist.all_reduce(flat)
    for parameter, value in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = value.view_as(parameter).clone()


def figures(seen: Mapping[str, float]) -> dict[str, float]:
    """Sums over the processes, of which each has its share; what ends in _max is the largest."""
    if ranks.count() == 1:
        return dict(seen)
    every = ranks.each(dict(seen))
    keys = dict.fromkeys(key for values in every for key in values)
    return {
        key: (max if key.endswith("_max") else sum)(values[key] for values in every if key in values) for key in keys
    }
