"""New models: what random weights need before training, and untrained ones after it."""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def calm_residuals(model: PreTrainedModel) -> None:
    """Scale what each block adds to the residual stream by 1/sqrt(2 × layers), as GPT-2 does: its variance then does
    not grow with depth."""
    scale = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(scale)


@torch.no_grad()
def separate_unseen(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Give tokens that never occurred (chat markers above all) fresh vectors of ordinary length; returns how many.

    Untrained rows all move alike and end as one vector: fine-tuning could then not tell one marker from another.
    """
    generator = torch.Generator().manual_seed(0)
    table = cast(torch.Tensor, model.get_input_embeddings().weight)
    seen = torch.bincount(ids.flatten(), minlength=len(table)) > 0
    unseen = (~seen).nonzero().flatten()
    for matrix in {id(m): m for m in (table, model.get_output_embeddings().weight)}.values():
        fresh = torch.randn(len(unseen), matrix.shape[1], generator=generator)
        matrix[unseen] = (fresh * matrix[seen].float().std()).to(matrix)
    return len(unseen)
