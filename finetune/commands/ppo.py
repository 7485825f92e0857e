"""`ft ppo`: reinforcement learning from a reward model or from rules, on one base in memory.

check recipe, output, prompts and rules -> train the reward model first where pairs are given, in a process of its own
-> load the base and its adapters -> rollouts and updates -> save and report.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from finetune import child, ranks
from finetune.data import pairs, prompts
from finetune.data.samples import held_out_section
from finetune.data.thinking import of_prompts
from finetune.errors import Interrupted, RunError, UserError
from finetune.evaluation.during import of_replies
from finetune.evaluation.rewards import load_rule
from finetune.recipe.file import to_yaml
from finetune.recipe.resolve import a_step, batch_layout
from finetune.recipe.sections import OutputConfig, TrainConfig
from finetune.recipe.stages import PpoRecipe, RewardModelConfig, RewardRecipe
from finetune.rl import models
from finetune.rl.ppo import Ppo, answered_rows
from finetune.run.directory import Run, resumable
from finetune.run.resuming import to_go_on
from finetune.run.writing import write_atomically
from finetune.terminal.progress import command, note
from finetune.training.finish import Words
from finetune.training.inputs import known_inputs
from finetune.training.optim import check_schedule
from finetune.training.plan import Layout, rollouts
from finetune.training.session import prepare
from finetune.training.start import seed_everything


def run(raw: PpoRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe, base = session.recipe, session.base
    encoder = base.asking(of_prompts(recipe, base.encoder), "ppo.thinking")
    models.check(recipe)
    rules = {name: load_rule(spec) for name, spec in names_of(recipe.reward.functions).items()}
    load = partial(prompts.load_prompts, seed=recipe.train.seed, eval_data=recipe.eval.paths)
    rows = ranks.once(lambda: load(recipe.data, encoder))
    if len(rows.train) < recipe.ppo.num_mini_batches * ranks.count():
        several = f" in each of {ranks.count()} processes" if ranks.count() > 1 else ""
        what = f"{len(rows.train)} prompts are too few for {recipe.ppo.num_mini_batches} minibatches{several}"
        raise UserError(what, key="ppo.num_mini_batches", fix="lower it, or give more prompts")
    held_out = []
    if recipe.eval.first is not None:
        section = held_out_section(recipe.eval.first.path, recipe.data)
        held_out = prompts.load_prompts(section, encoder).train[: recipe.eval.limit]
    chosen = [] if recipe.eval.during is None else of_replies(recipe.eval, answered_rows(held_out))
    folder = Run.of(recipe)
    first = reward_recipe(recipe, folder) if recipe.reward.train is not None else None
    if first is not None and (overwrite or not trained(folder)):
        pairs.load_pairs(first.data, encoder, to_score=True)  # what is wrong with them is said now
    batch, per_epoch, total = rollouts(recipe, len(rows.train))
    check_schedule(recipe.train, total)
    if recipe.eval.during is not None and (recipe.eval.during.steps or 0) > total:
        what = f"{recipe.eval.during.steps} rollouts between evaluations, and the run has {total}: there would be none"
        raise UserError(what, key="eval.during.steps", fix="lower it, or leave it out")
    fewer = f"{len(rows.train)} prompts: rollouts are of {batch}"
    session.plan(
        rows, longest=max(len(row.ids) for row in rows.train) + recipe.ppo.max_new_tokens,
        also=None if batch == recipe.train.effective_batch_size else fewer,
        cut=Layout(*batch_layout(*a_step(recipe), session.machine), per_epoch, total),
        updates=total * recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches,
    )  # fmt: skip
    if first is not None and resume and trained(folder):
        known_inputs(first, session.base, session.template, resume)
    if dry_run:
        session.show(f"rollouts of {batch} prompts; updates")
        return
    with session.run(overwrite):
        go_on = to_go_on(recipe)
        reward = recipe.reward.model if first is None else ranks.from_first(lambda: train_reward(first, folder, go_on))
        seed_everything(recipe)
        built = models.build(recipe, session.base, session.machine, reward)
        seed_everything(recipe)  # the same replies however many models were drawn
        trainer = Ppo(
            recipe=recipe, models=built, encoder=encoder, prompts=rows.train, held_out=held_out, rules=rules,
            arguments=session.arguments(), rows=session.layout.rows_per_pass, metrics=chosen, places=rows.places,
            trackers=session.trackers,
        )  # fmt: skip
        session.train(trainer, fit=Ppo.fit, words=Words(gist))


def gist(held_out: dict[str, Any]) -> str | None:
    if "reward_difference" not in held_out:
        return None
    low, high = held_out["reward_difference_ci"]
    change = f"{held_out['reward_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"held-out reward {held_out['reward_before']:.3f} -> {held_out['reward_mean']:.3f} ({change})"


def names_of(rules: list[str]) -> dict[str, str]:
    """{file.py:function, the whole path where two are alike: path}. UserError for one that is given twice."""
    short = [rule.replace("\\", "/").rpartition("/")[2] for rule in rules]
    found = {name if short.count(name) == 1 else rule: rule for name, rule in zip(short, rules, strict=True)}
    if len(found) < len(rules):
        raise UserError("a rule stands here twice", key="reward.functions", fix="set its weight in reward.weights")
    return found


def reward_recipe(recipe: PpoRecipe, run: Run) -> RewardRecipe:
    """What trains the reward model on `reward.train`."""
    given, section, usual = recipe.reward, recipe.data, TrainConfig()
    assert given.train is not None
    values: dict[str, Any] = {"version": 1, "stage": "reward", "model": recipe.model, "adapter": recipe.adapter}
    train = recipe.train.model_copy(
        update={
            "learning_rate": given.learning_rate or recipe.train.learning_rate,
            "warmup_steps": usual.warmup_steps, "lr_scheduler_type": usual.lr_scheduler_type,
            "num_train_epochs": given.num_train_epochs, "max_steps": None, "effective_batch_size": 16,
            "per_device_train_batch_size": None, "gradient_accumulation_steps": None, "save_steps": None,
            "eval_steps": None,
        }
    )  # fmt: skip
    longest = section.max_length + recipe.ppo.max_new_tokens  # a prompt and its reply
    data = section.model_copy(
        update={
            "train": given.train, "format": None, "columns": None, "max_length": longest, "packing": False,
            "train_on": "assistant",
            "eval_split": 0.05,  # its accuracy on these pairs says whether PPO has anything to follow
        }
    )  # fmt: skip
    objective = RewardModelConfig(center_rewards_coefficient=given.center_rewards_coefficient)
    output = OutputConfig(dir=str(run.reward))
    return RewardRecipe(**values, data=data, train=train, reward=objective, output=output)


def trained(run: Run) -> bool:
    """Whether the reward model is there already."""
    return Run(run.reward).done()


def train_reward(recipe: RewardRecipe, run: Run, go_on: str) -> str:
    """`ft reward` in its own process, from where it was stopped; kept when it is already there.

    Args:
        go_on: the command that goes on with the whole.
    """
    if trained(run):
        return str(run.reward)
    path = run.path / "reward.yaml"
    write_atomically(path, to_yaml(recipe, "# ft reward --recipe reward.yaml\n"))
    note("first the reward model:")
    how = "--resume" if Run(run.reward).last_checkpoint() else "--overwrite"
    code, _ = child.run("reward", "--recipe", str(path), how, shown=True)
    if code == 130 and not resumable(run):
        raise KeyboardInterrupt
    if code == 130:
        raise Interrupted(f"stopped while training the reward model; go on with {go_on}")
    if code < 0:
        what = f"the process that trains the reward model was ended by signal {-code}"
        raise RunError(f"{what}; go on with {go_on}" if resumable(run) else what)
    if code:
        error = UserError if code == 2 else RunError
        raise error(f"the reward model could not be trained ({command('reward', '--recipe', path)})")
    return str(run.reward)
