"""What is said when memory runs out."""

from __future__ import annotations

from finetune.planning.memory import estimate
from finetune.planning.network import build
from finetune.planning.sizing import CANNOT
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import Recipe

WAYS = 3


def figures(recipe: Recipe, machine: Hardware, rows: int, length: int) -> str | None:
    """What a pass takes by `ft plan`, in words; None where it cannot say.

    Args:
        rows: of a pass; length: tokens of the longest row.
    """
    try:
        found = estimate(build(recipe, skeleton(recipe.model)), recipe, rows, length, machine.device)
    except CANNOT:
        return None
    weights, peak = found.parts["weights"] / 1e9, found.peak / 1e9
    return (
        f"by ft plan {weights:,.3g} GB for the weights and {peak - weights:,.3g} GB for the rest with passes of {rows} "
        f"rows of up to {length:,} tokens, of {machine.memory_gb:,.3g} GB"
    )


def ways_out(recipe: Recipe, rows: int, length_key: str) -> list[str]:
    """The cheapest ways to need less memory, in speed and in what is learned, the cheapest first."""
    train, quantized = recipe.train, recipe.model.quantization is not None
    found = []
    if rows > 1:
        what = "train.auto_find_batch_size: true halves the rows of a pass by itself (the result is the same)"
        found.append(
            f"train.per_device_train_batch_size: {rows // 2} (the result is the same)"
            if train.auto_find_batch_size
            else f"train.per_device_train_batch_size: {rows // 2}, or {what}"
        )
    if not train.gradient_checkpointing:
        found.append("train.gradient_checkpointing: true (a step takes about a third longer)")
    if recipe.adapter.method == "full":
        found.append("adapter.method: lora (gradients and moments of few weights)")
    elif not quantized:
        found.append("model.quantization: int4 (a quarter of the weights' memory, slightly other answers)")
    return [*found, f"a shorter {length_key}"][:WAYS]
