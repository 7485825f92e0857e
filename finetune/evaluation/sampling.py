"""Tokens drawn row by row, and a repetition penalty that sees no padding: answers that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune.recipe.sections import GenerationConfig


def uniforms(seed: int, names: Sequence[object], count: int) -> torch.Tensor:
    """[len(names), count] float64 in [0, 1): those of a name depend on it and the seed alone, on every machine."""
    rows = []
    for name in names:
        generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


class Drawn:
    """A logits processor that leaves of each row only the token that is drawn, one number of `draws` a step.

    The number is looked up in the row's cumulated probabilities, so that a step costs one number per row, and the
    token is the same up to rounding however the rows are batched.
    """

    def __init__(self, how: GenerationConfig, draws: torch.Tensor) -> None:
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(how.temperature))]
        if how.top_k:
            self.warpers.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            self.warpers.append(TopPLogitsWarper(how.top_p))
        self.draws = iter(draws.unbind(1))

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warp in self.warpers:
            scores = warp(ids, scores)
        draw = next(self.draws)
        sums = scores.to(draw.dtype).softmax(-1).cumsum(-1)
        total = sums[:, -1]
        below = torch.minimum(draw * total, total.nextafter(torch.zeros_like(total)))  # rounding must not pass the end
        token = torch.searchsorted(sums, below[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class Repeated(RepetitionPenaltyLogitsProcessor):
    """transformers' penalty, but for padding: the pad token is often the one that ends an answer."""

    def __init__(self, penalty: float, mask: torch.Tensor) -> None:
        """mask: [rows, prompt], 0 on the padding at the left."""
        super().__init__(penalty)
        self.mask = mask.bool()

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows, width = self.mask.shape
        mask = self.mask.repeat_interleave(len(ids) // rows, 0)  # of beams
        prompt = torch.where(mask, ids[:, :width], ids[:, width - 1 : width])  # the last token is never padding
        return super().__call__(torch.cat([prompt, ids[:, width:]], 1), scores)
