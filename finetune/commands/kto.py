"""`ft kto`: learning from answers labelled good or bad (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

from functools import partial
from typing import Any

from trl import KTOConfig

from finetune import ranks
from finetune.data import pairs
from finetune.errors import UserError
from finetune.evaluation import during
from finetune.recipe.stages import KtoRecipe
from finetune.training import reference
from finetune.training.fit import finish_setup
from finetune.training.plan import Layout, longest_row, one_device
from finetune.training.preference import stuck, with_other_answers
from finetune.training.preference_trainers import Kto
from finetune.training.session import Session, prepare
from finetune.training.side_by_side import allow
from finetune.training.start import check_start, merged_start, policy


def run(raw: KtoRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    if recipe.data.train_on == "all":
        what = "KTO measures its KL term on other prompts' answers, and with `all` a prompt is part of the answer"
        raise UserError(what, key="data.train_on", fix="leave it out")
    check_start(recipe)
    load = partial(pairs.load_unpaired, seed=recipe.train.seed, eval_data=recipe.eval.paths)
    rows = ranks.once(lambda: load(recipe.data, session.base.encoder))
    session.during = during.prepare(recipe, session.base)
    session.plan(rows, longest_row(rows.train))
    check_others(session.layout, rows.train)
    if dry_run:
        session.show()
        return
    with session.run(overwrite) as folder:
        base = merged_start(recipe, folder) if recipe.kto.start == "merge" else session.base
        trainer = make_trainer(session, policy(recipe, base, session.machine))
        reference.add(trainer, recipe, base, session.layout)
        session.train(trainer, base, look=lambda run: stuck(run.read_metrics()))


def check_others(layout: Layout, rows: Any) -> None:
    """UserError where a row has no other one beside it, or none of another prompt."""
    if layout.rows_per_pass * layout.accumulation * ranks.shares() < 2:
        what = "KTO's KL term is a mean over the rows of a step, and one is alone in it"
        raise UserError(what, key="train.effective_batch_size", fix="set it to 2 or more")
    if len({tuple(ids) for ids in rows["prompt_ids"]}) < 2:
        what = "every answer is to the same prompt, and KTO's KL term is measured on answers to others"
        raise UserError(what, key="data.train", fix="give rows with other prompts, too")


def make_trainer(session: Session[KtoRecipe], model: Any) -> Kto:
    """trl's KTOTrainer with the recipe's objective."""
    kto, rows, seed = session.recipe.kto, session.rows, session.recipe.train.seed
    allow(model, session.recipe, session.machine)
    config = KTOConfig(
        **session.arguments(), beta=kto.beta, desirable_weight=kto.desirable_weight,
        undesirable_weight=kto.undesirable_weight, max_length=None,
    )  # fmt: skip
    trainer = Kto(
        model=model,
        args=one_device(config),
        train_dataset=with_other_answers(rows.train, rows.train, seed),
        eval_dataset=None if rows.eval is None else with_other_answers(rows.eval, rows.train, seed),
        processing_class=session.base.tokenizer,
        callbacks=session.callbacks(),
    )
    return finish_setup(trainer, session.recipe)
