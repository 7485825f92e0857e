"""`ft kto`: learning from answers labelled good or bad (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

from typing import Any

from finetune.data import pairs
from finetune.errors import UserError
from finetune.recipe.stages import KtoRecipe
from finetune.training.alignment import check_continues, kto_trainer, policy
from finetune.training.plan import Layout, longest_row
from finetune.training.preference import stuck
from finetune.training.session import prepare
from finetune.training.start import merged_start


def run(raw: KtoRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    if recipe.data.train_on == "all":
        what = "KTO measures its KL term on other prompts' answers, and with `all` a prompt is part of the answer"
        raise UserError(what, key="data.train_on", fix="leave it out")
    check_continues(recipe)
    rows = pairs.load_unpaired(recipe.data, session.base.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)
    session.plan(rows, longest_row(rows.train))
    check_others(session.layout, rows.train)
    if dry_run:
        session.show()
        return
    with session.run(overwrite) as folder:
        base = merged_start(recipe, folder) if recipe.kto.start == "merge" else session.base
        model, copy = policy(recipe, base, session.machine)
        trainer = kto_trainer(recipe, folder, model, copy, base, rows, session.layout, session.machine)
        session.train(trainer, base, look=lambda run: stuck(run.read_metrics()))


def check_others(layout: Layout, rows: Any) -> None:
    """UserError where a row has no other one, of another prompt, beside it."""
    if layout.rows_per_pass * layout.accumulation < 2:
        what = "KTO's KL term is measured on the other rows of a step, and one is alone in it"
        raise UserError(what, key="train.effective_batch_size", fix="set it to 2 or more")
    if len({tuple(ids) for ids in rows["prompt_ids"]}) < 2:
        what = "every answer is to the same prompt, and KTO's KL term is measured on answers to others"
        raise UserError(what, key="data.train", fix="give rows with other prompts, too")
