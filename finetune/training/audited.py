"""data_audit.json of a run: what its rows are like, and a few of them as the model sees them, with their masks."""

from __future__ import annotations

from typing import Any

from finetune.base import Base
from finetune.data import preview, sources
from finetune.data.rows import Rows
from finetune.data.samples import specs
from finetune.recipe.stages import ROWS, Recipe

SHOWN = 4
LONGEST = 3000
"""Characters of a row that are kept."""


def audited(recipe: Recipe, base: Base, rows: Rows) -> dict[str, Any]:
    return {"counts": rows.counts, **rows.seen, "preview": masks(recipe, base)}


def masks(recipe: Recipe, base: Base) -> list[dict[str, Any]]:
    """The first rows: {file, row, tokens, trained, parts: [[whether it is trained, text], …]}. None of prompts and raw
    text, which have no mask, and none of data elsewhere, which would be fetched again."""
    kind = ROWS[recipe.stage]
    if kind in ("prompts", "text") or sources.local_files(specs(recipe.data)) is None:
        return []
    shown = preview.samples(recipe.data, base.encoder, SHOWN, kind)
    return [mask(sample) for sample in shown]


def mask(sample: dict[str, Any]) -> dict[str, Any]:
    parts, room = [], LONGEST
    for trained, text in preview.runs(sample):
        parts.append([trained, text if len(text) <= room else f"{text[:room]}…"])
        room -= len(text)
        if room <= 0:
            break
    counts = {
        "tokens": len(sample["input_ids"]),
        "trained": sum(label != preview.IGNORED for label in sample["labels"]),
    }
    about: dict[str, Any] = {key: sample[key] for key in ("file", "row", "answer") if key in sample}
    return {**about, **counts, "parts": parts}
