"""`ft reward`: a scalar reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155)."""

from __future__ import annotations

from functools import partial
from typing import Any

from trl import RewardConfig

from finetune import ranks
from finetune.data import pairs
from finetune.errors import UserError
from finetune.recipe.stages import RewardRecipe
from finetune.training.finish import Words
from finetune.training.fit import finish_setup
from finetune.training.plan import longest_row, one_device, pad_multiple
from finetune.training.preference import ScoreCollator
from finetune.training.preference_trainers import Reward
from finetune.training.session import Session, prepare
from finetune.training.side_by_side import allow
from finetune.training.start import reward_model


def run(raw: RewardRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    if recipe.data.train_on != "assistant":
        what = "has no effect in ft reward: an answer is scored at its end"
        raise UserError(what, key="data.train_on", fix="leave it out")
    load = partial(pairs.load_pairs, seed=recipe.train.seed, eval_data=recipe.eval.paths, to_score=True)
    rows = ranks.once(lambda: load(recipe.data, session.base.encoder))
    session.plan(rows, longest_row(rows.train))
    if dry_run:
        session.show()
        return
    with session.run(overwrite):
        trainer = make_trainer(session, reward_model(recipe, session.base, session.machine))
        session.train(trainer, words=Words(gist, answers=False, hint=HINT))


HINT = "for ft ppo set reward.model: {run}; ft eval --reward scores the answers of other runs"


def gist(held_out: dict[str, Any]) -> str | None:
    return f"held-out pair accuracy {held_out['accuracy']:.3f}" if "accuracy" in held_out else None


def make_trainer(session: Session[RewardRecipe], model: Any) -> Reward:
    """trl's RewardTrainer with the recipe's objective."""
    reward, tokenizer = session.recipe.reward, session.base.tokenizer
    allow(model, session.recipe, session.machine)
    config = RewardConfig(
        **session.arguments(), center_rewards_coefficient=reward.center_rewards_coefficient, disable_dropout=False,
        max_length=None,
    )  # fmt: skip
    trainer = Reward(
        model=model,
        args=one_device(config),
        train_dataset=session.rows.train,
        eval_dataset=session.rows.eval,
        processing_class=tokenizer,
        data_collator=ScoreCollator(tokenizer.pad_token_id, pad_multiple(session.machine), reward.margin),
        callbacks=session.callbacks(),
    )
    return finish_setup(trainer, session.recipe)
