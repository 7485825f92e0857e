"""`ft reward`: a scalar reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155, eq. 1).

check recipe, output and pairs -> load the base -> score head and adapter -> train -> save and report.
"""

from __future__ import annotations

from finetune import alignment, training
from finetune.data import pairs
from finetune.models import hardware
from finetune.recipe import RewardRecipe, resolve
from finetune.run import check_resumable, open_run


def run(raw: RewardRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    machine = hardware.detect()
    recipe = resolve(raw, machine)
    if resume:
        check_resumable(recipe)
    parts = alignment.check(recipe)
    data = pairs.load_pairs(
        recipe.data, parts.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data, to_end_of_turn=True
    )
    plan = training.layout(recipe, len(data.train), len(data.train), machine)
    if dry_run:
        training.show_plan(recipe, data.counts, plan)
        return

    notes = training.announce(data.warnings, plan)
    with open_run(recipe, overwrite, resume) as folder:
        training.start(recipe)
        model = alignment.reward_model(recipe, parts, machine)
        trainer = alignment.reward_trainer(recipe, folder, model, parts, data, plan, machine)
        outcome = training.fit(trainer, folder, resume)
        weights = training.save(recipe, folder, model, parts.tokenizer, parts.encoder.template)
        training.finish(recipe, folder, trainer, outcome, data.counts, notes)
        training.summary(recipe, folder, weights)
