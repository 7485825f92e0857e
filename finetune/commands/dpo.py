"""`ft dpo`: learning from preference pairs (Rafailov et al. 2023, arXiv:2305.18290, and its kin)."""

from __future__ import annotations

from functools import partial
from typing import Any

from trl import DPOConfig

from finetune import ranks
from finetune.data import pairs
from finetune.errors import UserError
from finetune.evaluation import during
from finetune.recipe.stages import REFERENCE_FREE, DpoRecipe
from finetune.training import reference
from finetune.training.fit import finish_setup
from finetune.training.plan import Layout, longest_row, one_device, pad_multiple
from finetune.training.preference import PairCollator, stuck
from finetune.training.preference_trainers import SORTED, Dpo
from finetune.training.session import Session, prepare
from finetune.training.side_by_side import allow
from finetune.training.start import check_start, merged_start, policy


def run(raw: DpoRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    check_start(recipe)
    load = partial(pairs.load_pairs, seed=recipe.train.seed, eval_data=recipe.eval.paths)
    rows = ranks.once(lambda: load(recipe.data, session.base.encoder))
    session.during = during.prepare(recipe, session.base)
    session.plan(rows, longest_row(rows.train))
    check_sorted(recipe, session.layout)
    if dry_run:
        session.show()
        return
    with session.run(overwrite) as folder:
        base = merged_start(recipe, folder) if recipe.dpo.start == "merge" else session.base
        trainer = make_trainer(session, policy(recipe, base, session.machine))
        if recipe.dpo.loss_type not in REFERENCE_FREE:
            reference.add(trainer, recipe, base, session.layout)
        session.train(trainer, base, look=lambda run: stuck(run.read_metrics()))


def check_sorted(recipe: DpoRecipe, layout: Layout) -> None:
    """UserError for an objective that needs all pairs of a step in one pass."""
    if recipe.dpo.loss_type in SORTED and layout.accumulation > 1:
        step = layout.rows_per_pass * layout.accumulation
        what = f"{recipe.dpo.loss_type} sorts the pairs of a step, and a pass holds {layout.rows_per_pass} of {step}"
        fix = f"set it to {step} and train.gradient_accumulation_steps to 1, or use another dpo.loss_type"
        raise UserError(what, key="train.per_device_train_batch_size", fix=fix)


def make_trainer(session: Session[DpoRecipe], model: Any) -> Dpo:
    """trl's DPOTrainer with the recipe's objective."""
    dpo, tokenizer = session.recipe.dpo, session.base.tokenizer
    allow(model, session.recipe, session.machine)
    config = DPOConfig(
        **session.arguments(), loss_type=["sigmoid" if dpo.loss_type in REFERENCE_FREE else dpo.loss_type],
        beta=dpo.beta, label_smoothing=dpo.label_smoothing, max_length=None,
    )  # fmt: skip
    trainer = Dpo(
        dpo=dpo,
        model=model,
        args=one_device(config),
        train_dataset=session.rows.train,
        eval_dataset=session.rows.eval,
        processing_class=tokenizer,
        data_collator=PairCollator(tokenizer.pad_token_id, pad_multiple(session.machine)),
        callbacks=session.callbacks(),
    )
    return finish_setup(trainer, session.recipe)
