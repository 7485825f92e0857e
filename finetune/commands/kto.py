"""`ft kto`: learning from answers labelled good or bad (Ethayarajh et al. 2024, arXiv:2402.01306).

check recipe, output and rows -> load the base -> policy and reference -> train -> save and report.
"""

from __future__ import annotations

from typing import Any

from finetune.data import pairs
from finetune.data.conversations import SftData
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import KtoRecipe
from finetune.run import Run
from finetune.training import alignment
from finetune.training.alignment import Parts
from finetune.training.preference import stuck
from finetune.training.session import Layout


def run(raw: KtoRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    alignment.run_stage(raw, resume, overwrite, dry_run, load, make, lambda run: stuck(run.read_metrics()))


def load(recipe: KtoRecipe, parts: Parts) -> SftData:
    return pairs.load_unpaired(recipe.data, parts.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)


def make(
    recipe: KtoRecipe, run: Run, parts: Parts, data: SftData, plan: Layout, machine: Hardware
) -> tuple[Any, ModelConfig, Any]:
    base = alignment.merged_start(recipe, run) if recipe.kto.start == "merge" else recipe.model
    model = alignment.policy(recipe, base, parts, machine)
    return model, base, alignment.kto_trainer(recipe, run, model, base, parts, data, plan, machine)
