"""`ft dpo`: learning from preference pairs (Rafailov et al. 2023, arXiv:2305.18290, and its kin)."""

from __future__ import annotations

from finetune.data import pairs
from finetune.errors import UserError
from finetune.recipe.stages import DpoRecipe
from finetune.training.alignment import check_continues, dpo_trainer, policy
from finetune.training.plan import Layout, longest_row
from finetune.training.preference import stuck
from finetune.training.session import prepare
from finetune.training.start import merged_start
from finetune.training.trainers import SORTED


def run(raw: DpoRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    check_continues(recipe)
    rows = pairs.load_pairs(recipe.data, session.base.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)
    session.plan(rows, longest_row(rows.train))
    check_sorted(recipe, session.layout)
    if dry_run:
        session.show()
        return
    with session.run(overwrite) as folder:
        base = merged_start(recipe, folder) if recipe.dpo.start == "merge" else session.base
        model, copy = policy(recipe, base, session.machine)
        trainer = dpo_trainer(recipe, folder, model, copy, base.model, base, rows, session.layout, session.machine)
        session.train(trainer, base, look=lambda run: stuck(run.read_metrics()))


def check_sorted(recipe: DpoRecipe, layout: Layout) -> None:
    """UserError for an objective that needs all pairs of a step in one pass."""
    if recipe.dpo.loss_type in SORTED and layout.accumulation > 1:
        step = layout.rows_per_pass * layout.accumulation
        what = f"{recipe.dpo.loss_type} sorts the pairs of a step, and a pass holds {layout.rows_per_pass} of {step}"
        fix = f"set it to {step} and train.gradient_accumulation_steps to 1, or use another dpo.loss_type"
        raise UserError(what, key="train.per_device_train_batch_size", fix=fix)
