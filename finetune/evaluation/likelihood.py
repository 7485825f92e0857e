"""How probable a model finds texts, in batches of rows of like length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from finetune.models.hardware import input_device

ROOM = 8192  # tokens in a batch, padding included
LOGITS = 1 << 27  # of a batch: 0.5 GB in float32, and cross entropy holds them three times; 512 tokens of Gemma 3


def right_pad(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, longest], real tokens at the left end."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def by_length(lengths: Sequence[int], batch_size: int, room: int = ROOM) -> Iterator[list[int]]:
    """Numbers of the rows that are computed together, short ones first; fewer at once where they are long."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[i] > room):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def takes(model: Any, name: str) -> bool:
    """Whether the network's forward has this argument."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(network.forward).parameters


def room_of(model: Any) -> int:
    """Tokens in a batch of which all logits are computed."""
    return min(ROOM, LOGITS // int(model.config.get_text_config().vocab_size))


class Likelihood(NamedTuple):
    """Of the labels of a row."""

    total: float
    """Summed negative log-likelihood in nats."""
    tokens: int
    right: int
    """Tokens that are the most probable one at their place."""


@torch.inference_mode()
def negative_log_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], pad: int, batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Likelihood]:  # fmt: skip
    """Of the labels of each row (ids, labels)."""
    model.eval()
    device = input_device(model)
    result = [Likelihood(0.0, 0, 0)] * len(rows)
    for batch in by_length([len(ids) for ids, _ in rows], batch_size, room_of(model)):
        # Padded right: causal attention never looks there, and positions start at 0 as in training.
        ids, mask = right_pad([rows[i][0] for i in batch], pad, device)
        labels, _ = right_pad([rows[i][1] for i in batch], -100, device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        counts = (labels[:, 1:] != -100).sum(1).tolist()
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(1).tolist()
        for row, *found in zip(batch, losses.double().sum(1).tolist(), counts, right, strict=True):
            result[row] = Likelihood(*found)
        on_batch(len(batch))
    return result


def per_token(scored: Likelihood) -> dict[str, float | None]:
    """Nats per token of a row, how many these are, and the share of them that the model holds for the most probable;
    None where no token is trained."""
    total, count, right = scored
    share = right / count if count else None
    return {"loss": total / count if count else None, "loss_tokens": count, "token_accuracy": share}
