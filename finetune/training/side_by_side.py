"""The rows of a pass as one row without padding, for networks that attend document by document (`models.documents`).

Where nothing is drawn at random in a pass, a pair's prompt goes through the network once for both answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from finetune.models import documents
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import Recipe


def allow(model: Any, recipe: Recipe, machine: Hardware) -> None:
    """Lets rows stand side by side where training is the same then.

    torch.compile would compile anew for all lengths of documents; NEFTune's noise is the smaller the longer a row is;
    weights for GPUs may lie on the CPU at first.
    """
    train = recipe.train
    if machine.device == "cpu" and not train.torch_compile and train.neftune_noise_alpha is None:
        documents.use(model)


def unpadded(model: Any, network: Any, share: bool = False) -> Callable[..., Any]:
    """The model for rows padded right, as trl calls it for its log-probabilities.

    Args:
        model: what is called; network: the same without what wraps it for several processes. share: whether the rows
            are [chosen…, rejected…] whose prompts go through the network once.
    """
    if not documents.used(network):
        return model

    def forward(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
        lengths = attention_mask.sum(1).tolist()
        width, half = input_ids.shape[1] - 1, len(lengths) // 2
        starts, order = [0] * len(lengths), [*range(len(lengths))]
        if share:
            starts = [0] * half + prompts(input_ids, labels, lengths)
            order = [row for pair in range(half) for row in (pair, half + pair)]  # the rejected one behind its chosen
        inputs = in_one(input_ids, lengths, starts, order)
        targets = torch.cat([labels[row, starts[row] : lengths[row]] for row in order])
        sizes = torch.tensor([lengths[row] - starts[row] for row in order], device=targets.device)
        begins = sizes.cumsum(0) - sizes
        targets = targets.index_fill(0, begins, -100)  # what would be told by the document before it
        outputs = model(**inputs, labels=targets[None], **more)
        # Where the logits of token t + 1 of a row are in the one row, and whether they are there.
        place = torch.zeros(len(lengths), width, dtype=torch.long, device=targets.device)
        there = torch.zeros_like(place, dtype=torch.bool)
        for row, begin in zip(order, begins.tolist(), strict=True):
            steps = torch.arange(lengths[row] - starts[row] - 1, device=targets.device)
            place[row, starts[row] + steps], there[row, starts[row] + steps] = begin + steps, True
        return type(outputs)(**{name: in_rows(value, place, there) for name, value in outputs.items()})

    return forward


def scored(model: Any, network: Any) -> Callable[..., Any]:
    """The same of a model with a score head (`models.score_head`), which has one score of each row."""
    if not documents.used(network):
        return model

    def forward(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        lengths = attention_mask.sum(1).tolist()
        return model(**in_one(input_ids, lengths, [0] * len(lengths), range(len(lengths))), **more)

    return forward


def in_one(input_ids: torch.Tensor, lengths: list[int], starts: list[int], order: Any) -> dict[str, torch.Tensor]:
    """ids and positions [1, N] of rows in this order, each from its start on."""
    ids = torch.cat([input_ids[row, starts[row] : lengths[row]] for row in order])
    positions = torch.cat([torch.arange(starts[row], lengths[row], device=ids.device) for row in order])
    return {"input_ids": ids[None], "position_ids": positions[None]}


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


@torch.no_grad()
def draws(model: Any) -> bool:
    """Whether a pass in training draws anything at random, found by trying: dropout of any kind, noise on what chooses
    experts, weights that are drawn. Each answer then has a prompt of its own."""
    modes = {module: module.training for module in model.modules()}
    ids = torch.arange(3, 11, device=model.get_input_embeddings().weight.device)[None]
    before = torch.get_rng_state()
    try:
        model.train()
        with torch.autocast(ids.device.type, model.dtype, enabled=model.dtype != torch.float32):
            model(input_ids=ids, use_cache=False)
        return not torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_rng_state(before)
        for module, mode in modes.items():
            module.training = mode
