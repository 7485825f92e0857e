"""`ft dpo`: learning from preference pairs (Rafailov et al. 2023, arXiv:2305.18290, and its kin).

check recipe, output and pairs -> load the base -> policy and reference -> train -> save and report.
"""

from __future__ import annotations

from finetune import alignment, training
from finetune.data import pairs
from finetune.models import hardware
from finetune.preference import stuck
from finetune.progress import warn
from finetune.recipe import DpoRecipe, resolve
from finetune.run import check_resumable, open_run


def run(raw: DpoRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    machine = hardware.detect()
    recipe = resolve(raw, machine)
    if resume:
        check_resumable(recipe)
    parts = alignment.check(recipe)
    data = pairs.load_pairs(recipe.data, parts.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)
    plan = training.layout(recipe, len(data.train), len(data.train), machine)
    if dry_run:
        training.show_plan(recipe, data.counts, plan)
        return

    notes = training.announce(data.warnings, plan)
    with open_run(recipe, overwrite, resume) as folder:
        training.start(recipe)
        base = alignment.merged_start(recipe, folder) if recipe.dpo.start == "merge" else recipe.model
        model, copy = alignment.policy(recipe, base, parts, machine)
        trainer = alignment.dpo_trainer(recipe, folder, model, copy, base, parts, data, plan, machine)
        outcome = training.fit(trainer, folder, resume)
        weights = training.save(recipe, folder, model, parts.tokenizer, parts.encoder.template, base)
        if (reason := stuck(folder.read_metrics())) is not None:
            warn(reason)
            notes.append(reason)
        training.finish(recipe, folder, trainer, outcome, data.counts, notes)
        training.summary(recipe, folder, weights)
