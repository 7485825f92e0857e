"""Pairs of answers as one row without padding, for networks that attend document by document (`models.documents`).

Where nothing is drawn at random in a pass, a pair's prompt goes through the network once for both answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune.models import documents


def pairs(model: Any, network: Any, share: bool = True) -> Callable[..., Any]:
    """The model for rows of [chosen…, rejected…], padded right, as trl calls it for its log-probabilities.

    Args:
        model: what is called; network: the same without what wraps it for several processes. share: whether prompts may
            be shared.
    """
    if not documents.used(network):
        return model

    def forward(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
        lengths = attention_mask.sum(1).tolist()
        shared = prompts(input_ids, labels, lengths) if share and not draws(network) else [0] * (len(lengths) // 2)
        width, half = input_ids.shape[1] - 1, len(lengths) // 2
        starts = [0] * half + shared
        order = [row for pair in range(half) for row in (pair, half + pair)]  # the rejected one behind its chosen one
        cut = [slice(start, length) for start, length in zip(starts, lengths, strict=True)]
        ids = torch.cat([input_ids[row, cut[row]] for row in order])
        positions = torch.cat([torch.arange(starts[row], lengths[row], device=ids.device) for row in order])
        targets = torch.cat([labels[row, cut[row]] for row in order])
        sizes = torch.tensor([lengths[row] - starts[row] for row in order], device=ids.device)
        begins = sizes.cumsum(0) - sizes
        targets = targets.index_fill(0, begins, -100)  # what would be told by the document before it
        outputs = model(input_ids=ids[None], position_ids=positions[None], labels=targets[None], **more)
        # Where the logits of token t + 1 of a row are in the one row, and whether they are there.
        place = torch.zeros(len(lengths), width, dtype=torch.long, device=ids.device)
        there = torch.zeros(len(lengths), width, dtype=torch.bool, device=ids.device)
        for row, begin in zip(order, begins.tolist(), strict=True):
            steps = torch.arange(lengths[row] - starts[row] - 1, device=ids.device)
            place[row, starts[row] + steps], there[row, starts[row] + steps] = begin + steps, True
        return type(outputs)(**{name: in_rows(value, place, there) for name, value in outputs.items()})

    return forward


def in_rows(value: Any, place: torch.Tensor, there: torch.Tensor) -> Any:
    """[1, N - 1] -> [rows, width]; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        return value
    found = value[0].index_select(0, place.flatten()).view(place.shape)
    return torch.where(there, found, torch.zeros_like(found))


def prompts(input_ids: torch.Tensor, labels: torch.Tensor, lengths: list[int]) -> list[int]:
    """Of each pair, with how many tokens both rows begin that are neither trained nor the last before what is trained,
    behind which each has another."""
    half, found = len(lengths) // 2, []
    for one, other in zip(range(half), range(half, len(lengths)), strict=True):
        most = min(lengths[one], lengths[other])
        differ = (input_ids[one, :most] != input_ids[other, :most]).nonzero().flatten()
        trained = ((labels[one, :most] != -100) | (labels[other, :most] != -100)).nonzero().flatten()
        ends = [most, *differ[:1].tolist(), *trained[:1].tolist()]
        found.append(max(0, min(ends) - 1))
    return found


def draws(network: Any) -> bool:
    """Whether a pass draws at random which activations it drops: each answer then has a prompt of its own."""
    dropouts = (m.p for m in network.modules() if m.training and isinstance(m, nn.Dropout))
    config = documents.network_of(network).config.get_text_config()
    return any(dropouts) or (network.training and bool(getattr(config, "attention_dropout", 0.0)))
