"""How much a run has to do: rows, their tokens, steps. As training finds it from the data, without the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.methods import METHODS
from finetune.base import Base
from finetune.data import packing, prompts, text
from finetune.data.audit import Audit
from finetune.data.rows import divided, gathered
from finetune.models import sources
from finetune.planning.source import is_unconverted, shipped
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import as_list
from finetune.recipe.stages import ROWS, PpoRecipe, Recipe
from finetune.training.new_base import open_base
from finetune.training.plan import layout, rollouts


@dataclass(frozen=True)
class Amount:
    rows: int | None = None
    """To train on: without those held out, with those of weighted sources as often as they come."""
    tokens: float | None = None
    """Mean of a row as it goes through the model: of one of a pair's answers, of a packed row."""
    steps: int | None = None
    cut: tuple[int, int] | None = None
    """(rows of a pass, passes of a step) of packed rows."""


def amount(recipe: Recipe, machine: Hardware) -> Amount:
    """UserError for data that is not there, and where training stops at it.

    Args:
        recipe: resolved; machine: with the rows that fit it.
    """
    limit = recipe.train.max_steps
    if text.WORLD in as_list(recipe.data.train):
        return Amount(steps=limit)
    base = base_of(recipe)
    if recipe.stage == "pretrain":
        if base is None:
            return Amount(steps=limit)  # texts are cut into blocks of tokens
        wanted = limit and limit * recipe.train.effective_batch_size
        new = recipe.model.is_new
        load = text.load_blocks(recipe.data, base.tokenizer, seed=recipe.train.seed, wanted=wanted, is_new=new)
        rows = len(load.train)
        return Amount(rows, float(recipe.data.max_length), layout(recipe, rows, rows, machine).total_steps)
    lengths = lengths_of(recipe, base)
    rows, tokens = len(lengths), float(lengths.mean()) if base is not None else None
    if isinstance(recipe, PpoRecipe):
        if rows < recipe.ppo.num_mini_batches:
            return Amount(rows, tokens, limit)  # training refuses it by name
        return Amount(rows, tokens, rollouts(recipe, rows)[2])
    packed = None
    if recipe.data.packing and base is not None and METHODS[recipe.adapter.method].virtual_tokens is None:
        packed = len(packing.plan(lengths, recipe.data.max_length))
    cut = layout(recipe, rows, packed or rows, machine)
    if packed is None:
        return Amount(rows, tokens, cut.total_steps)
    return Amount(rows, float(lengths.sum()) / packed, cut.total_steps, (cut.rows_per_pass, cut.accumulation))


def base_of(recipe: Recipe) -> Base | None:
    """Its tokenizer and template, where they are here: nothing is fetched."""
    model = recipe.model
    if model.is_new:
        return open_base(model)  # type: ignore[arg-type]
    here = isinstance(sources.place(model), Path) and shipped(model) is None and not is_unconverted(model)
    return replace(Base.open(model), treatment=recipe.data.thinking) if here else None


def lengths_of(recipe: Recipe, base: Base | None) -> Any:
    """Tokens of the rows to train on, zeros without a tokenizer: [rows], of pairs the mean of their answers."""
    data, seed = recipe.data, recipe.train.seed
    if isinstance(recipe, PpoRecipe) and base is not None:
        return np.asarray([len(row.ids) for row in prompts.load_prompts(data, base.encoder, seed=seed).train])

    def size(item: Any, encoded: Any) -> float:
        every = encoded.values() if isinstance(encoded, dict) else [encoded] if encoded is not None else []
        return sum(len(one.input_ids) for one in every) / max(1, len(every))

    audit = Audit(data, None if base is None else base.encoder, ROWS[recipe.stage])
    found, hashes, weights, places = gathered(audit, seed, size)
    every = np.asarray(found, float)
    return divided(lambda numbers: every[numbers], hashes, weights, data.eval_split, {}, [], places, {}).train
