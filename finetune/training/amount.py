"""How much a run has to do: rows, their tokens, steps. As training finds it from the data, without the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.methods import METHODS
from finetune.base import Base
from finetune.data import packing, prompts, text
from finetune.data.audit import Audit, Encoding
from finetune.data.rows import divided, gathered
from finetune.data.samples import Item
from finetune.models import sources
from finetune.planning.source import is_unconverted, shipped
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig, PretrainModelConfig, as_list
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


@dataclass(frozen=True)
class Data:
    """Of the rows to train on."""

    lengths: Any
    """Tokens of each: [rows], of a pair the mean of its answers; zeros where the tokenizer is not here."""
    known: bool
    """Whether it is."""


def read(recipe: Recipe) -> Data | None:
    """None where rows are not to be counted: endless text, and texts without their tokenizer, which cuts them into
    blocks. UserError for data that is not there, and for rows that training would stop at.

    Args:
        recipe: resolved.
    """
    if text.WORLD in as_list(recipe.data.train):
        return None
    base, seed = base_of(recipe), recipe.train.seed
    if recipe.stage == "pretrain":
        if base is None:
            return None
        wanted = recipe.train.max_steps and recipe.train.max_steps * recipe.train.effective_batch_size
        new = recipe.model.is_new
        rows = len(text.load_blocks(recipe.data, base.tokenizer, seed=seed, wanted=wanted, is_new=new).train)
        return Data(np.full(rows, recipe.data.max_length), True)
    if recipe.stage == "ppo" and base is not None:
        found = prompts.load_prompts(recipe.data, base.encoder, seed=seed).train
        return Data(np.asarray([len(row.ids) for row in found]), True)
    audit = Audit(recipe.data, None if base is None else base.encoder, ROWS[recipe.stage])
    sizes, hashes, weights, places = gathered(audit, seed, size)
    every = np.asarray(sizes, float)
    split = recipe.data.eval_split
    lengths = divided(lambda numbers: every[numbers], hashes, weights, split, {}, [], places, {}).train
    return Data(lengths, base is not None and recipe.stage != "ppo")


def size(item: Item, encoded: Encoding) -> float:
    every = list(encoded.values()) if isinstance(encoded, dict) else [encoded] if encoded is not None else []
    return sum(len(one.input_ids) for one in every) / max(1, len(every))


def amount(recipe: Recipe, data: Data | None, machine: Hardware) -> Amount:
    """UserError for a schedule that does not fit the steps.

    Args:
        recipe: resolved; machine: with the rows that fit it.
    """
    if data is None:
        return Amount(steps=recipe.train.max_steps)
    lengths, rows = data.lengths, len(data.lengths)
    tokens = float(lengths.mean()) if data.known else None
    if isinstance(recipe, PpoRecipe):
        few = rows < recipe.ppo.num_mini_batches  # training refuses it by name
        return Amount(rows, tokens, recipe.train.max_steps if few else rollouts(recipe, rows)[2])
    packed = None
    if recipe.data.packing and data.known and METHODS[recipe.adapter.method].virtual_tokens is None:
        packed = len(packing.plan(lengths, recipe.data.max_length))
    cut = layout(recipe, rows, packed or rows, machine)
    if packed is None:
        return Amount(rows, tokens, cut.total_steps)
    return Amount(rows, float(lengths.sum()) / packed, cut.total_steps, (cut.rows_per_pass, cut.accumulation))


def base_of(recipe: Recipe) -> Base | None:
    """Its tokenizer and template, where they are here: nothing is fetched."""
    model = recipe.model
    if isinstance(model, PretrainModelConfig) and model.is_new:
        name = str(model.tokenizer)
        here = name.startswith("builtin:") or isinstance(sources.place(ModelConfig(name=name)), Path)
        return open_base(model) if here else None
    here = isinstance(sources.place(model), Path) and shipped(model) is None and not is_unconverted(model)
    return replace(Base.open(model), treatment=recipe.data.thinking) if here else None
