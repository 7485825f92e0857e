"""What PPO hands to its arithmetic, each against a plain loop over tokens; what a step does and logs.

Replies of unequal length, a policy that has left its reference, padding filled with values that must not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_kit import ppo_recipe, run_ppo, scaled

from finetune.adapters.multiple import activated
from finetune.errors import RunError
from finetune.recipe.file import load
from finetune.recipe.stages import PpoRecipe
from finetune.rl.ppo import Ppo, repetition
from finetune.rl.replies import response_logits, token_values
from finetune.rl.rollout import Rollout
from finetune.run.directory import Run
from finetune.training.plan import rollouts

COEFFICIENTS = {
    "num_mini_batches": 2, "missing_eos_penalty": 0.7, "kl_coef": 0.3, "gamma": 0.95, "lam": 0.8, "cliprange": 0.05,
    "cliprange_value": 0.02, "vf_coef": 0.25, "entropy_coef": 0.03, "temperature": 0.9, "max_kl": 1000.0,
    "normalize_rewards": False,
}  # fmt: skip


class Looked(Exception):
    """The trainer has been looked at; no training."""


def looking(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Ppo], None],
    train: dict[str, Any] | None = None, **ppo: Any,
) -> None:  # fmt: skip
    """Calls `look` with a trainer that is ready to start, its policy moved away from the reference."""

    def fit(self: Ppo, run: Run, *_: Any) -> dict[str, Any]:
        self.run = run
        move(self, 0.3)
        self.collector.stops = list(range(90, 140))  # so many that some replies end early and some do not
        look(self)
        raise Looked

    monkeypatch.setattr(Ppo, "fit", fit)
    path = ppo_recipe(
        tmp_path,
        scaled(base, tmp_path / "sharp", 8.0),
        ppo={**COEFFICIENTS, **ppo},
        train={"per_device_train_batch_size": 3, **(train or {})},
    )
    with pytest.raises(Looked):
        run_ppo(path)


def move(trainer: Ppo, deviation: float) -> None:
    """Noise on everything that is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.learner.module.parameters():
            if parameter.requires_grad:
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def collected(trainer: Ppo) -> Rollout:
    """The first rollout."""
    return trainer.collector.collect(trainer.prompts_of(0), trainer.state, lambda _: None)


def lengths(rollout: Rollout) -> list[int]:
    found = [int(n) for n in rollout.replies.mask.sum(1)]
    assert len(set(found)) > 2, "unequal lengths"
    return found


@pytest.mark.parametrize(
    ("ppo", "pay"),
    [
        ({"whiten_advantages": False}, lambda score, every: score),
        ({"whiten_advantages": True}, lambda score, every: score),
        (
            {"whiten_advantages": False, "normalize_rewards": True, "clip_rewards": 0.5},
            lambda score, every: max(-0.5, min(0.5, (score - average(every)) / math.sqrt(spread(every)))),
        ),
    ],
    ids=["plain", "whitened", "normalised"],
)
def test_what_replies_are_paid(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, ppo: dict[str, Any], pay: Callable[..., float]
) -> None:
    def look(trainer: Ppo) -> None:
        trainer.state.kl_coef = 0.4  # as it was adapted
        rollout = collected(trainer)
        ended = rollout.replies.ended.tolist()
        assert 0 < sum(ended) < len(ended)
        c = trainer.recipe.ppo
        expected, returns = [], []
        for i, n in enumerate(lengths(rollout)):
            logp, ref, values = (t[i, :n].tolist() for t in (rollout.logp, rollout.ref_logp, rollout.values))
            assert max(abs(a - b) for a, b in zip(logp, ref, strict=True)) > 0.01
            rewards = [-0.4 * (a - b) for a, b in zip(logp, ref, strict=True)]
            rewards[-1] += pay(rollout.scores[i], rollout.scores) - (0.0 if ended[i] else c.missing_eos_penalty)
            row, following = [0.0] * n, 0.0
            for t in reversed(range(n)):
                delta = rewards[t] + c.gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t]
                row[t] = following = delta + c.gamma * c.lam * following
            expected.append(row)
            returns.append([a + v for a, v in zip(row, values, strict=True)])
        if c.whiten_advantages:
            every = [a for row in expected for a in row]
            expected = [[(a - average(every)) / math.sqrt(spread(every)) for a in row] for row in expected]
        for i, (row, back) in enumerate(zip(expected, returns, strict=True)):
            assert rollout.advantages[i, : len(row)].tolist() == pytest.approx(row, abs=1e-4)
            assert rollout.returns[i, : len(row)].tolist() == pytest.approx(back, abs=1e-4)

    looking(tmp_path, base, monkeypatch, look, **ppo)


def test_scores_are_normalised_by_all_so_far(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(trainer: Ppo) -> None:
        scores, ended = [[1.0, 2.0, 6.0, 9.0], [-3.0, 4.0]], torch.tensor([True] * 4)
        for n, row in enumerate(scores):
            paid = trainer.collector.paid(row, ended[: len(row)], trainer.state).tolist()
            every = [score for part in scores[: n + 1] for score in part]
            wanted = [(score - average(every)) / math.sqrt(spread(every)) for score in row]
            assert paid == pytest.approx(wanted, rel=1e-5)

    looking(tmp_path, base, monkeypatch, look, normalize_rewards=True)


def test_scores_of_several_sources_are_weighed(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(trainer: Ppo) -> None:
        collector, prompts = trainer.collector, trainer.prompts_of(0)[:2]
        collector.scorers = {"a": lambda *_: [1.0, 2.0], "b": lambda *_: [10.0, 30.0]}
        assert collector.score(prompts, ["x", "y"]) == ([11.0, 32.0], {"a": [1.0, 2.0], "b": [10.0, 30.0]})
        for weights, sums in (([2.0, -0.5], [-3.0, -11.0]), ([1.0, 1e308], None)):
            reward = trainer.recipe.reward.model_copy(update={"weights": weights})
            collector.recipe = trainer.recipe.model_copy(update={"reward": reward})
            if sums is None:
                with pytest.raises(RunError, match=r"the reward of reply 'x' is inf: lower reward\.weights"):
                    collector.score(prompts, ["x", "y"])
            else:
                assert collector.score(prompts, ["x", "y"])[0] == sums

    looking(tmp_path, base, monkeypatch, look)


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    return average([(v - average(values)) ** 2 for v in values])


def test_gradients_of_a_minibatch(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policy and of the value, over rows in several forward passes of unequal token counts."""

    def look(trainer: Ppo) -> None:
        rollout = collected(trainer)
        padding = rollout.replies.mask == 0
        assert padding.any()
        for tensor, junk in (
            (rollout.advantages, 40.0), (rollout.returns, -30.0), (rollout.values, 20.0), (rollout.logp, -3.0),
        ):  # fmt: skip
            tensor[padding] = junk
        move(trainer, 0.05)  # ratios are no longer 1, values no longer the old ones
        index = torch.tensor([5, 0, 11, 3, 14, 8, 2, 9])
        seen = trainer.learner.minibatch(rollout, index)
        found = gradients(trainer)
        losses = by_hand(trainer, rollout, index.tolist())
        wanted = gradients(trainer)
        for key, value in losses.items():
            assert seen[key] == pytest.approx(value, abs=1e-5), key
        assert 0 < seen["clip_fraction"] < 1
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4 * float(tensor.abs().max()), rtol=0)

    looking(tmp_path, base, monkeypatch, look)


def gradients(trainer: Ppo) -> dict[str, torch.Tensor]:
    """Copies of all that are there, which are gone then."""
    found = {n: p.grad.clone() for n, p in trainer.learner.module.named_parameters() if p.grad is not None}
    trainer.learner.module.zero_grad()
    assert any(float(g.abs().max()) > 1e-4 for g in found.values())
    return found


def by_hand(trainer: Ppo, rollout: Rollout, index: list[int]) -> dict[str, float]:
    """Leaves the gradients of the whole objective; its parts by name. One row at a time, one token at a time."""
    c, models = trainer.recipe.ppo, trainer.models
    sums = dict.fromkeys(("loss", "value_loss", "entropy", "clip_fraction", "approx_kl", "log_ratio_max"), 0.0)
    every = lengths(rollout)
    total = sum(every[i] for i in index)
    for i in index:
        part = rollout.replies.rows(torch.tensor([i]))
        with activated(models.policy) as model:
            logp = torch.log_softmax(response_logits(model, part)[0] / c.temperature, dim=-1)
            objective = torch.zeros(())
            for t in range(every[i]):
                difference = logp[t, part.tokens[0, t]] - rollout.logp[i, t]
                ratio, advantage = difference.exp(), rollout.advantages[i, t]
                plain = -advantage * ratio
                clipped = -advantage * ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
                loss, uncertainty = torch.maximum(plain, clipped), -(logp[t].exp() * logp[t]).sum()
                objective = objective + loss - c.entropy_coef * uncertainty
                seen = {
                    "loss": loss, "entropy": uncertainty, "clip_fraction": clipped > plain,
                    "approx_kl": difference**2 / 2,
                }  # fmt: skip
                for key, value in seen.items():
                    sums[key] += float(value.detach()) / total
                sums["log_ratio_max"] = max(sums["log_ratio_max"], abs(float(difference.detach())))
            (objective / total).backward()
        with activated(models.value) as model:
            values, objective = token_values(model, models.value_head, part)[0], torch.zeros(())
            for t in range(every[i]):
                old, target = rollout.values[i, t], rollout.returns[i, t]
                near = values[t].clamp(old - c.cliprange_value, old + c.cliprange_value)
                objective = objective + 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            sums["value_loss"] += float(objective.detach()) / total
            (c.vf_coef * objective / total).backward()
    return sums


def test_every_model_reads_with_its_own_adapter(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply at a time; the policy would read other values than the value model, and other probabilities than ref."""

    def look(trainer: Ppo) -> None:
        rollout, models = collected(trainer), trainer.models

        @torch.no_grad()
        def read(which: Any, i: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
            part = rollout.replies.rows(torch.tensor([i]))
            with activated(which) as model:
                logp = torch.log_softmax(response_logits(model, part)[0, :n] / trainer.recipe.ppo.temperature, dim=-1)
                return logp[range(n), part.tokens[0, :n]], token_values(model, models.value_head, part)[0, :n]

        apart = torch.zeros(2)
        for i, n in enumerate(lengths(rollout)):
            (logp, foreign), (ref, _), (_, values) = (
                read(which, i, n) for which in (models.policy, models.ref, models.value)
            )
            for found, wanted in ((rollout.logp, logp), (rollout.ref_logp, ref), (rollout.values, values)):
                torch.testing.assert_close(found[i, :n], wanted, atol=1e-4, rtol=0)
            apart = torch.maximum(apart, torch.stack([(logp - ref).abs().max(), (foreign - values).abs().max()]))
        assert (apart > 0.01).all()

    looking(tmp_path, base, monkeypatch, look)


def test_top_k_and_top_p_hold_while_learning(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy that learns is renormalised over the tokens from which the replies were drawn, not over its own."""

    def look(trainer: Ppo) -> None:
        rollout = collected(trainer)
        assert rollout.allowed is not None
        move(trainer, 0.05)
        found = trainer.learner.minibatch(rollout, torch.arange(4))["log_ratio_max"]
        wanted = 0.0
        for i, n in enumerate(lengths(rollout)[:4]):
            part = rollout.replies.rows(torch.tensor([i]))
            with torch.no_grad(), activated(trainer.models.policy) as model:
                logits = response_logits(model, part)[0] / trainer.recipe.ppo.temperature
            kept = rollout.allowed.ids[i].long().split(rollout.allowed.counts[i].tolist())
            for t in range(n):
                logp = logits[t, part.tokens[0, t]] - logits[t, kept[t]].logsumexp(-1)
                wanted = max(wanted, abs(float(logp - rollout.logp[i, t])))
        assert wanted > 0.01
        assert found == pytest.approx(wanted, abs=1e-4)

    looking(tmp_path, base, monkeypatch, look, top_k=20, top_p=0.9)


def test_first_log_ratio(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the policy read again, a reply at a time: none as it was sampled from, and how far it was moved since."""

    def look(trainer: Ppo) -> None:
        rollout = collected(trainer)
        first = list(range(trainer.batch // 2))
        assert by_hand(trainer, rollout, first)["log_ratio_max"] < 1e-4
        move(trainer, 0.05)
        moved = by_hand(trainer, rollout, first)["log_ratio_max"]
        trainer.learner.module.zero_grad()
        assert moved > 0.1
        assert trainer.learner.update(rollout, 1)["first_log_ratio"] == pytest.approx(moved, abs=1e-4)

    looking(tmp_path, base, monkeypatch, look)


def taken(trainer: Ppo, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each minibatch, from now on."""
    found: list[list[int]] = []
    minibatch = trainer.learner.minibatch

    def noted(rollout: Rollout, index: torch.Tensor) -> dict[str, float]:
        found.append(index.tolist())
        return minibatch(rollout, index)

    monkeypatch.setattr(trainer.learner, "minibatch", noted)
    return found


def test_every_pass_takes_every_row_in_another_order(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(trainer: Ppo) -> None:
        minibatches = taken(trainer, monkeypatch)
        trainer.learner.update(collected(trainer), 1)
        passes = [[*a, *b] for a, b in zip(minibatches[::2], minibatches[1::2], strict=True)]
        assert passes[0] == list(range(trainer.batch))
        assert [sorted(rows) for rows in passes] == [passes[0]] * 3
        assert len({tuple(rows) for rows in passes}) == 3

    looking(tmp_path, base, monkeypatch, look, num_ppo_epochs=3, max_update_kl=1000.0)


@pytest.mark.parametrize(("most", "minibatches", "backed_off"), [(1e-6, 2, 1.0), (1000.0, 4, None)])
def test_a_policy_that_moves_too_far_backs_off(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, most: float, minibatches: int, backed_off: float | None
) -> None:
    """The first minibatch sees a policy that has not moved, the second one that has."""

    def look(trainer: Ppo) -> None:
        seen = taken(trainer, monkeypatch)
        assert trainer.step().get("backed_off") == backed_off
        assert len(seen) == minibatches

    looking(tmp_path, base, monkeypatch, look, max_update_kl=most)


def test_what_a_step_logs(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(trainer: Ppo) -> None:
        rollout = collected(trainer)
        longest = int(rollout.replies.mask.sum(1).argmax())
        rollout.replies.tokens[longest] = rollout.replies.tokens[longest, 0]  # one that repeats itself
        monkeypatch.setattr(trainer.collector, "collect", lambda *_: rollout)
        row = trainer.step()
        kl, repeated, errors, returns = [], [], [], []
        for i, n in enumerate(lengths(rollout)):
            logp, ref, values, back = (
                t[i, :n].tolist() for t in (rollout.logp, rollout.ref_logp, rollout.values, rollout.returns)
            )
            kl.append(sum(math.exp(b - a) - 1 + a - b for a, b in zip(logp, ref, strict=True)))
            repeated.append(repetition(rollout.replies.tokens[i, :n].tolist()))
            errors += [a - b for a, b in zip(back, values, strict=True)]
            returns += back
        assert row["kl"] == pytest.approx(average(kl), rel=1e-4)
        assert row["repetition"] == pytest.approx(average(repeated))
        assert row["repetition"] > 0
        assert row["explained_variance"] == pytest.approx(1 - spread(errors) / spread(returns), abs=1e-4)
        assert row["response_length"] == pytest.approx(average(lengths(rollout)))
        assert row["eos_rate"] == average(rollout.replies.ended.tolist())

    looking(tmp_path, base, monkeypatch, look)


@pytest.mark.parametrize(
    ("ids", "share"), [([7] * 12, 0.9), ([1, 2, 3] * 3, 4 / 7), ([*range(9)], 0.0), ([7] * 6, 0.75), ([7] * 5, 0.0)]
)
def test_repetition(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.parametrize(("target", "error"), [(1e-3, 0.2), (1e3, -0.2)])
def test_the_kl_coefficient_follows_the_target(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, target: float, error: float
) -> None:
    """Up where the policy is further away than wanted, down where it is nearer; from the next rollout on."""

    def look(trainer: Ppo) -> None:
        row = trainer.step()
        assert 1e-3 < row["kl"] < 1e3
        assert row["kl_coef"] == COEFFICIENTS["kl_coef"]
        assert trainer.state.kl_coef == pytest.approx(row["kl_coef"] * (1 + error * trainer.batch / 1000))

    looking(tmp_path, base, monkeypatch, look, kl_target=target, kl_horizon=1000)


@pytest.mark.parametrize("models", ["shared", "separate"])
def test_the_value_model_has_a_learning_rate_of_its_own(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    def look(trainer: Ppo) -> None:
        rates = {id(p): group["lr"] for group in trainer.learner.optimizer.param_groups for p in group["params"]}
        found: dict[bool, set[float]] = {True: set(), False: set()}
        for name, parameter in trainer.learner.module.named_parameters():
            if parameter.requires_grad:  # the first module is the policy's, and the value's adapter may be on it
                found[not name.startswith("0.") or "ppo_value" in name].add(rates[id(parameter)])
        assert found == {True: {1e-4}, False: {5e-3}}

    looking(tmp_path, base, monkeypatch, look, models=models, value_learning_rate=1e-4)


def test_prompts_of_each_step(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None twice in an epoch; another order in every epoch, and with every seed. Of 32 prompts, 12 at a time."""
    drawn: list[list[list[int]]] = []

    def look(trainer: Ppo) -> None:
        place = {id(prompt): i for i, prompt in enumerate(trainer.prompts)}
        steps = [[place[id(prompt)] for prompt in trainer.prompts_of(step)] for step in range(4)]
        assert [len(rows) for rows in steps] == [12] * 4
        for first, second in (steps[:2], steps[2:]):
            assert len({*first, *second}) == 24
        assert steps == [[place[id(prompt)] for prompt in trainer.prompts_of(step)] for step in range(4)]
        drawn.append(steps)
        asked, rollout = [], collected(trainer)

        def collect(prompts: Any, *_: Any) -> Rollout:
            asked.append([place[id(prompt)] for prompt in prompts])
            return rollout

        monkeypatch.setattr(trainer.collector, "collect", collect)
        for _ in range(4):
            trainer.step()
        assert asked == steps, "and these are what a step asks"

    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with monkeypatch.context() as patch:
            looking(folder, base, patch, look, train={"effective_batch_size": 12, "seed": seed}, num_ppo_epochs=1)
    orders = {tuple(first + second) for steps in drawn for first, second in (steps[:2], steps[2:])}
    assert len(orders) == 4
    assert len({frozenset(order) for order in orders}) == 4, "each epoch leaves out others"
    assert tuple(range(24)) not in orders


@pytest.mark.parametrize(
    ("prompts", "train", "cut"),
    [
        (70, {"effective_batch_size": 32, "num_train_epochs": 3}, (32, 2, 6)),
        (70, {"effective_batch_size": 32, "num_train_epochs": 0.1}, (32, 2, 1)),
        (70, {"effective_batch_size": 32, "max_steps": 5}, (32, 2, 5)),
        (30, {"effective_batch_size": 64, "num_train_epochs": 3}, (28, 1, 3)),
        (4, {"effective_batch_size": 64, "num_train_epochs": 1}, (4, 1, 1)),
    ],
)
def test_rollouts_of_a_run(
    tmp_path: Path, base: Path, prompts: int, train: dict[str, Any], cut: tuple[int, int, int]
) -> None:
    """As large as asked for, or as all prompts that are whole minibatches of four."""
    path = ppo_recipe(tmp_path, base, train={"max_steps": None, **train}, ppo={"num_mini_batches": 4})
    assert rollouts(load(str(path), PpoRecipe), prompts) == cut


def test_the_schedule_follows_the_rollouts(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the schedule for each, unless loss scaling has left out all its updates."""

    def look(trainer: Ppo) -> None:
        rates = []
        step = trainer.learner._step

        def noted(number: int) -> float:
            rates.append(trainer.learner.optimizer.param_groups[0]["lr"])
            return step(number)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.learner, "_step", noted)
            rows = [trainer.step() for _ in range(2)]
        wanted = [5e-3, 3.75e-3]
        assert [row["learning_rate"] for row in rows] == pytest.approx(wanted)
        assert rates == pytest.approx([wanted[0]] * 4 + [wanted[1]] * 4)
        monkeypatch.setattr(trainer.learner, "_step", lambda number: math.inf)
        left_out = [trainer.step() for _ in range(2)]
        assert [row["learning_rate"] for row in left_out] == pytest.approx([2.5e-3] * 2)
        assert "grad_norm" not in left_out[0]

    train = {"lr_scheduler_type": "linear", "max_steps": 4}
    looking(tmp_path, base, monkeypatch, look, train=train, num_ppo_epochs=2, max_update_kl=1000.0)


def test_gradients_are_clipped_and_only_matrices_decay(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(trainer: Ppo) -> None:
        learner = trainer.learner
        names = {id(p): name for name, p in learner.module.named_parameters()}
        for group in learner.optimizer.param_groups:
            assert {names[id(p)].endswith("bias") for p in group["params"]} == {group["weight_decay"] == 0.0}
        assert {group["weight_decay"] for group in learner.optimizer.param_groups} == {0.0, 0.3}
        norms = []

        def step(*_: Any, **__: Any) -> None:
            norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in learner.weights.values())))

        learner.optimizer.register_step_pre_hook(step)
        found = learner.update(collected(trainer), 1)
        assert found["grad_norm"] > 0.1, "what is logged is the norm before"
        assert norms == pytest.approx([1e-3] * len(norms), rel=1e-2)
        assert len(norms) == 4

    train = {"max_grad_norm": 1e-3, "weight_decay": 0.3}
    looking(tmp_path, base, monkeypatch, look, train=train, num_ppo_epochs=2, max_update_kl=1000.0)


def test_held_out_prompts_leave_the_run_as_it_is(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same replies whenever they are asked for, and the same rollouts with or without them."""

    def look(trainer: Ppo) -> None:
        trainer.held_out = trainer.prompts[:8]
        before = torch.get_rng_state()
        first = trainer.held_out_scores()
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert trainer.held_out_scores() == first

    looking(tmp_path, base, monkeypatch, look)
