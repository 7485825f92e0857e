"""Packing, where documents in one row cannot see each other: found by trying."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from finetune import ranks
from finetune.adapters.methods import METHODS, active
from finetune.models import documents
from finetune.recipe.stages import Recipe
from finetune.terminal.progress import task

ROUNDED = 1e-5  # of the largest logit, in float32


def one_row(model: PreTrainedModel, packed: bool = True) -> bool:
    """Whether the rows of a pass become one: where attention takes documents of any length (varlen), as it would
    compute, and mask, the square of a row's length otherwise. On CPUs that holds for rows that are not packed, too:
    there is no padding then."""
    return documents.used(model) or (packed and "flash" in str(model.config._attn_implementation))


@torch.no_grad()
def documents_isolated(model: PreTrainedModel, ids: list[int]) -> bool:
    """Whether documents packed into one row are invisible to each other, found by trying, in as many rows as `Collator`
    makes of them.

    Two documents share a row, told apart by position ids alone. If changing the first changes the logits of the
    second, attention (or virtual tokens, or ALiBi) leaks, whatever the documentation says. What an adapter does behind
    a mark is not seen by trying.
    """
    if documents.begins_at_a_mark(model):
        return False
    half = len(ids) // 2
    positions = torch.tensor([[*range(half), *range(len(ids) - half)]], device=model.device)
    changed = [(i + 1) % 256 for i in ids[:half]] + ids[half:]
    was_training = model.training
    model.eval()
    try:
        copies = 1 if one_row(model) else 2
        positions = positions.expand(copies, -1)
        rows = [torch.tensor([row] * copies, device=model.device) for row in (ids, changed)]
        # As in training: what is trained is float32, also on a bfloat16 base.
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            a, b = (model(input_ids=row, position_ids=positions, use_cache=False).logits for row in rows)
    finally:
        model.train(was_training)
    if a.shape[1] != len(ids):
        return False
    # Experts round otherwise where they are given other numbers of tokens: 4e-7 of the largest logit, a leak 0.1 to 1.
    allowed = ROUNDED * float(a.abs().max()) if a.dtype == torch.float32 else 0.0
    return float((a[:, half:] - b[:, half:]).abs().max()) <= allowed


def packed_rows(recipe: Recipe, rows: Any) -> int | None:
    """How many rows packing makes of them, found without a model; None where they are not packed."""
    if not recipe.data.packing or METHODS[recipe.adapter.method].virtual_tokens is not None or not len(rows):
        return None
    from finetune.data.packing import lengths_of, plan

    return len(plan(lengths_of(rows), recipe.data.max_length))


SHARED_TOKENS = "packing is off: documents in one row would share the virtual tokens and see each other"


def pack_if_isolated(recipe: Recipe, model: PreTrainedModel, rows: Any) -> tuple[Any, str | None]:
    """(rows, packed if asked for and safe; one line saying why not)."""
    if not recipe.data.packing:
        return rows, None
    if active(model).virtual_tokens is not None:
        return rows, SHARED_TOKENS
    from finetune.data.packing import pack

    sample = [i for ids in rows[: min(len(rows), 64)]["input_ids"] for i in ids][:64]
    sample = (sample * 64)[:32] if len(sample) < 32 else sample
    with task("looking whether packed documents see each other", after=1.0):
        isolated = ranks.of_all(lambda: documents_isolated(model, sample))  # others may have no weights yet
    if not isolated:
        return rows, "packing is off: documents in one row would see each other with this model and adapter"
    with task(f"packing {len(rows):,} rows", after=1.0):
        return pack(rows, recipe.data.max_length), None


def packing_outlook(recipe: Recipe) -> str | None:
    """What a dry run can say of packing."""
    if not recipe.data.packing:
        return None
    if METHODS[recipe.adapter.method].virtual_tokens is not None:
        return SHARED_TOKENS
    return "packing: whether documents in one row are apart is tried when the model is loaded; steps are those without"
