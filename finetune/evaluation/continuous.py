"""Continuous batches: an answer that has ended makes room for the next prompt.

transformers' `generate` computes every row until the last one has ended. Here it stops when a quarter of the rows has
ended: they leave ids, mask and cache, prompts that wait take their place, and it goes on where it was. Rows share one
width and are padded at the left, so a row computes what it would compute alone, up to rounding.

transformers' own continuous batches (`generate_batch`) take no processors of the caller's, with which answers are drawn
independently of the batch, and are slower on CPUs (docs/performance.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad as padded
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer

from finetune.adapters.methods import active

SHARE = 4
"""One of so many rows must have ended before the others are interrupted."""
COUNTS_FROM_THE_START = ("cpmant", "moss_transcribe_diarize")
"""Types that compute something else for a text when they go on with it; of transformers' other causal types that a tiny
model could be made of, each wrote in continuous batches what it writes alone."""


@dataclass
class Rows:
    """Rows at work; tensors [rows, width], of which the cache knows all but the last column."""

    numbers: list[int]
    """Of their prompts."""
    told: list[int]
    """Tokens of each answer so far."""
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any


def can(model: Any) -> bool:
    """Whether it goes on from a cache that is handed to it; what is in that cache, `whole` says. peft puts a prefix in
    front of every call."""
    return active(model).virtual_tokens is None and model.config.model_type not in COUNTS_FROM_THE_START


def whole(cache: Any) -> bool:
    """Whether rows may leave and enter: keys and values of every position in every layer, and no other state."""
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers
    )


def of(rows: Rows, kept: list[int]) -> Rows:
    """Only these of the rows, by their place, without columns that are padding in all of them."""
    which = torch.tensor(kept, device=rows.ids.device)
    ids, mask = rows.ids[which], rows.mask[which]
    first = int(mask.any(0).int().argmax())
    for layer in rows.cache.layers:
        place = which.to(layer.keys.device)
        layer.keys, layer.values = layer.keys[place, :, first:], layer.values[place, :, first:]
    numbers, told = ([listed[i] for i in kept] for listed in (rows.numbers, rows.told))
    return Rows(numbers, told, ids[:, first:], mask[:, first:], rows.cache)


def joined(one: Rows, other: Rows, pad: int) -> Rows:
    """Both, in the width of the wider one."""
    width = max(one.ids.shape[1], other.ids.shape[1])
    short = [width - rows.ids.shape[1] for rows in (one, other)]

    def stacked(a: torch.Tensor, b: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([padded(t, (n, 0), value=value) for t, n in zip((a, b), short, strict=True)])

    for mine, theirs in zip(one.cache.layers, other.cache.layers, strict=True):
        for name in ("keys", "values"):
            both = [padded(getattr(layer, name), (0, 0, n, 0)) for layer, n in zip((mine, theirs), short, strict=True)]
            setattr(mine, name, torch.cat(both))
    return Rows(
        one.numbers + other.numbers, one.told + other.told, stacked(one.ids, other.ids, pad),
        stacked(one.mask, other.mask, 0), one.cache,
    )  # fmt: skip


class Enough(StoppingCriteria):
    """Ends the writing of all rows when a part of them has ended."""

    def __init__(self, width: int, stops: list[int], rows: int, device: torch.device) -> None:
        """width: of the ids before the first new token."""
        self.width, self.many = width, -(-rows // SHARE)
        self.stops = torch.tensor(stops, device=device)

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> Any:
        ended = torch.isin(ids[:, self.width :], self.stops).any(1)
        return (ended.sum() >= self.many).expand(len(ids))
