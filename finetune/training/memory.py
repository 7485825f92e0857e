"""What a run takes by `ft plan`: for its record, and for what is said when memory runs out."""

from __future__ import annotations

from typing import Any

from finetune.planning import fits
from finetune.planning.memory import Estimate, estimate
from finetune.planning.network import Network, build
from finetune.planning.sizing import CANNOT
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import Recipe

WAYS = 3
ENOUGH = 0.9
"""Of what the plan has a pass take beside the weights, what must be left where the plan said that it fits."""
NOTHING = "nothing that can be changed in the recipe makes it fit: a smaller base, or a larger machine"


def planned(
    recipe: Recipe, machine: Hardware, rows: int, length: int, network: Network | None = None
) -> Estimate | None:
    """None for a network that cannot be gone through without numbers.

    Args:
        rows: of a pass; length: tokens of the longest row; network: the recipe's, where it is built already.
    """
    recipe = of_rows(recipe, rows)
    try:
        network = network or build(recipe, skeleton(recipe.model))
        return estimate(network, recipe, rows, length, machine.device, fits.accumulation(recipe))
    except CANNOT:
        return None


def record(found: Estimate) -> dict[str, Any]:
    """For result.json: GB (10^9 bytes), by part."""
    parts = {part: round(size / 1e9, 4) for part, size in found.parts.items()}
    return {"peak_memory_gb": round(found.peak / 1e9, 4), "memory": parts, "rows": found.rows, "tokens": found.length}


def figures(found: Estimate, machine: Hardware) -> str:
    """What a pass takes, in words."""
    weights, peak = found.parts["weights"] / 1e9, found.peak / 1e9
    return (
        f"by ft plan {weights:,.3g} GB for the weights and {peak - weights:,.3g} GB for the rest with passes of "
        f"{found.rows} rows of up to {found.length:,} tokens, of {machine.memory_gb:,.3g} GB"
    )


def ways_out(recipe: Recipe, machine: Hardware, rows: int, found: Estimate | None) -> list[str]:
    """The cheapest changes that need less memory, those of `ft plan`; without their figures where it has none."""
    recipe = of_rows(recipe, rows)
    changes: list[tuple[dict[str, Any], str]] = []
    if found is not None:
        network = skeleton(recipe.model)
        made = fits.changes(recipe, network, found, machine, enough(found, machine))
        if len(made) < WAYS:  # then also what is less at all, the most first
            less = fits.changes(recipe, network, found, machine, found.peak - 1)
            made += sorted((one for one in less if all(one.settings != o.settings for o in made)), key=lambda o: o.peak)
        for one in made:
            time = "the same time" if one.slowdown == 1 else f"{one.slowdown:.2f} x the time"
            changes.append((one.settings, f"{one.why}; {one.peak / 1e9:,.3g} GB, {time}"))
    else:
        options = fits.candidates(recipe, fits.length_of(recipe))
        changes = [(settings, why) for settings, _, why in options if fits.is_allowed(recipe, settings)]
    told: dict[tuple[str, ...], str] = {}
    for settings, why in changes:
        by_itself = ""
        if fits.ROWS in settings and not recipe.train.auto_find_batch_size:
            by_itself = ", or train.auto_find_batch_size: true, which finds it by itself"
        text = " and ".join(f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
                            for key, value in settings.items())  # fmt: skip
        told.setdefault(tuple(settings), f"{text}{by_itself} ({why})")
    return list(told.values())[:WAYS] or [NOTHING]


def enough(found: Estimate, machine: Hardware) -> float:
    """Bytes that a change must come down to: where the plan had said that it fits, clearly less beside the weights."""
    held = found.parts["weights"] + found.parts["framework"]
    return min(fits.budget(machine), held + ENOUGH * (found.peak - held))


def of_rows(recipe: Recipe, rows: int) -> Recipe:
    """With the rows of a pass that were found when they were packed, where the recipe may name them."""
    train = recipe.train
    if train.per_device_train_batch_size or (recipe.data.packing and train.gradient_accumulation_steps):
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"per_device_train_batch_size": rows})})
