"""`ft reward`: a scalar reward model from preference pairs (Bradley and Terry 1952; Ouyang et al. 2022,
arXiv:2203.02155)."""

from __future__ import annotations

from typing import Any

from finetune.data import pairs
from finetune.errors import UserError
from finetune.recipe.stages import RewardRecipe
from finetune.training.alignment import reward_trainer
from finetune.training.finish import Words
from finetune.training.plan import longest_row
from finetune.training.session import prepare
from finetune.training.start import reward_model


def run(raw: RewardRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe = session.recipe
    if recipe.data.train_on != "assistant":
        what = "has no effect in ft reward: an answer is scored at its end"
        raise UserError(what, key="data.train_on", fix="leave it out")
    rows = pairs.load_pairs(
        recipe.data, session.base.encoder, seed=recipe.train.seed, eval_data=recipe.eval.data, to_score=True
    )
    session.plan(rows, longest_row(rows.train))
    if dry_run:
        session.show()
        return
    with session.run(overwrite) as folder:
        model = reward_model(recipe, session.base, session.machine)
        trainer = reward_trainer(recipe, folder, model, session.base, rows, session.layout, session.machine)
        session.train(trainer, words=Words(gist, answers=False, hint=HINT))


HINT = "for ft ppo set reward.model: {run}; ft eval --reward scores the answers of other runs"


def gist(held_out: dict[str, Any]) -> str | None:
    return f"held-out pair accuracy {held_out['accuracy']:.3f}" if "accuracy" in held_out else None
