"""`ft plan`: the recipe, the card and the model's config, before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.early.inputs import together
from finetune.models import sources
from finetune.places import check_file, json_with
from finetune.planning import cards
from finetune.recipe.file import load
from finetune.recipe.stages import Recipe

WRITTEN = json_with("peak_memory_gb", "memory")


def recipe(reference: str, overrides: Sequence[str], gpu: str | None, json_file: str | None) -> Recipe:
    """The recipe. UserError for what is wrong with it, with the card, with the report's place, and a base that is not
    here; data may be elsewhere."""
    found: Recipe = load(reference, None, overrides)

    def place() -> None:
        if json_file is not None and json_file != "-":
            check_file(Path(json_file), "--json", WRITTEN)

    def card() -> None:
        if gpu is not None:
            cards.card(gpu)

    def base() -> None:
        if not found.model.is_new:
            sources.check(found.model)
            if isinstance(sources.place(found.model), Path):
                sources.check_there(found.model)

    together(place, card, base)
    return found
