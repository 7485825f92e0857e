"""The recipe with as many rows per pass as there is memory for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.adapters import compatibility
from finetune.adapters.compatibility import AnyRecipe
from finetune.adapters.load import adapter_config
from finetune.errors import UserError
from finetune.models import sources
from finetune.planning import fits
from finetune.planning.network import Network, build
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware, a_step, resolve

CANNOT = (UserError, RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)
"""What networks raise that cannot be gone through without numbers; of a UserError training says it itself."""


def sized(raw: AnyRecipe, machine: Hardware) -> tuple[Hardware, Network | None]:
    """(the machine with the rows that fit it, the network that said so), where that is asked for and known: `ft plan`
    says why it is not."""
    train = raw.train
    if train.per_device_train_batch_size or train.gradient_accumulation_steps:
        return machine, None
    try:
        recipe = resolve(continued(raw), machine)
        network = build(recipe, skeleton(recipe.model))
        return replace(machine, rows=rows_of(network, recipe, machine)), network
    except CANNOT:
        return machine, None


def continued(recipe: AnyRecipe) -> AnyRecipe:
    """With the settings of the adapter that training goes on from, where it is there. UserError where they differ."""
    start = getattr(getattr(recipe, recipe.stage, None), "start", "continue")
    folder = sources.find_adapter(recipe.model.adapter) if recipe.model.adapter is not None else None
    if folder is None or start == "merge":
        return recipe
    return compatibility.continued(recipe, adapter_config(folder), folder)


def rows_of(network: Network, recipe: Any, machine: Hardware) -> int:
    step, length = a_step(recipe)
    cap = step.effective_batch_size
    if machine.device == "cpu":
        cap = max(1, min(cap, fits.MOST_TOKENS_ON_CPU // length))
    return fits.rows_that_fit(network, recipe, length, machine, cap, start=cap)
