"""`ft reward`: a scalar reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155, eq. 1).

check recipe, output and pairs -> load the base -> score head and adapter -> train -> save and report.
"""

from __future__ import annotations

from typing import Any

from finetune.data import pairs
from finetune.data.conversations import SftData
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import RewardRecipe
from finetune.run.directory import Run
from finetune.training import alignment
from finetune.training.alignment import Parts
from finetune.training.session import Layout


def run(raw: RewardRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    alignment.run_stage(raw, resume, overwrite, dry_run, load, make)


def load(recipe: RewardRecipe, parts: Parts) -> SftData:
    seed, held_out = recipe.train.seed, recipe.eval.data
    return pairs.load_pairs(recipe.data, parts.encoder, seed=seed, eval_data=held_out, to_score=True)


def make(
    recipe: RewardRecipe, run: Run, parts: Parts, data: SftData, plan: Layout, machine: Hardware
) -> tuple[Any, ModelConfig, Any]:
    model = alignment.reward_model(recipe, parts, machine)
    return model, recipe.model, alignment.reward_trainer(recipe, run, model, parts, data, plan, machine)
