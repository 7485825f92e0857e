"""What `Ppo` hands to the arithmetic of `rl`, each against a plain loop over tokens; what a step does and logs.

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
from finetune.rl.ppo import Ppo, Rollout, repetition
from finetune.rl.rollout import response_logits, token_values

COEFFICIENTS = {
    "num_mini_batches": 2, "missing_eos_penalty": 0.7, "kl_coef": 0.3, "gamma": 0.95, "lam": 0.8, "cliprange": 0.05,
    "cliprange_value": 0.02, "vf_coef": 0.25, "entropy_coef": 0.03, "temperature": 0.9, "max_kl": 1000.0,
    "normalize_rewards": False,
}  # fmt: skip


class Looked(Exception):
    """The trainer has been looked at; no training."""


def looking(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Ppo], None], **ppo: Any
) -> None:
    """Calls `look` with a trainer that is ready to start, its policy moved away from the reference."""

    def train(self: Ppo, resume: Path | None) -> dict[str, Any]:
        move(self, 0.3)
        self.stops = list(range(90, 140))  # so many that some replies end early and some do not
        look(self)
        raise Looked

    monkeypatch.setattr(Ppo, "train", train)
    path = ppo_recipe(
        tmp_path,
        scaled(base, tmp_path / "sharp", 8.0),
        ppo={**COEFFICIENTS, **ppo},
        train={"per_device_train_batch_size": 3},
    )
    with pytest.raises(Looked):
        run_ppo(path)


def move(trainer: Ppo, deviation: float) -> None:
    """Noise on everything that is trained."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.module.parameters():
            if parameter.requires_grad:
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


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
        rollout = trainer.collect(trainer.prompts_of(0))
        ended = rollout.replies.ended.tolist()
        assert 0 < sum(ended) < len(ended)
        c = trainer.config
        expected, returns = [], []
        for i, n in enumerate(lengths(rollout)):
            logp, ref, values = (t[i, :n].tolist() for t in (rollout.logp, rollout.ref_logp, rollout.values))
            assert max(abs(a - b) for a, b in zip(logp, ref, strict=True)) > 0.01
            rewards = [-c.kl_coef * (a - b) for a, b in zip(logp, ref, strict=True)]
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


def average(values: list[float]) -> float:
    return sum(values) / len(values)


def spread(values: list[float]) -> float:
    return average([(v - average(values)) ** 2 for v in values])


def test_gradients_of_a_minibatch(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the policy and of the value, over rows in several forward passes of unequal token counts."""

    def look(trainer: Ppo) -> None:
        rollout = trainer.collect(trainer.prompts_of(0))
        padding = rollout.replies.mask == 0
        assert padding.any()
        for tensor, junk in (
            (rollout.advantages, 40.0), (rollout.returns, -30.0), (rollout.values, 20.0), (rollout.logp, -3.0),
        ):  # fmt: skip
            tensor[padding] = junk
        move(trainer, 0.05)  # ratios are no longer 1, values no longer the old ones
        index = torch.tensor([5, 0, 11, 3, 14, 8, 2, 9])
        seen = trainer.minibatch(rollout, index)
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
    found = {n: p.grad.clone() for n, p in trainer.module.named_parameters() if p.grad is not None}
    trainer.module.zero_grad()
    assert any(float(g.abs().max()) > 1e-4 for g in found.values())
    return found


def by_hand(trainer: Ppo, rollout: Rollout, index: list[int]) -> dict[str, float]:
    """Leaves the gradients of the whole objective; its parts by name. One row at a time, one token at a time."""
    c, actors = trainer.config, trainer.actors
    sums = dict.fromkeys(("loss", "value_loss", "entropy", "clip_fraction", "approx_kl", "log_ratio_max"), 0.0)
    every = lengths(rollout)
    total = sum(every[i] for i in index)
    for i in index:
        part = rollout.replies.rows(torch.tensor([i]))
        with activated(actors.policy) as model:
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
        with activated(actors.value) as model:
            values, objective = token_values(model, actors.value_head, part)[0], torch.zeros(())
            for t in range(every[i]):
                old, target = rollout.values[i, t], rollout.returns[i, t]
                near = values[t].clamp(old - c.cliprange_value, old + c.cliprange_value)
                objective = objective + 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            sums["value_loss"] += float(objective.detach()) / total
            (c.vf_coef * objective / total).backward()
    return sums


def test_first_log_ratio(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the policy read again, a reply at a time: none as it was sampled from, and how far it was moved since."""

    def look(trainer: Ppo) -> None:
        rollout = trainer.collect(trainer.prompts_of(0))
        first = list(range(trainer.batch // 2))
        assert by_hand(trainer, rollout, first)["log_ratio_max"] < 1e-4
        move(trainer, 0.05)
        moved = by_hand(trainer, rollout, first)["log_ratio_max"]
        trainer.module.zero_grad()
        assert moved > 0.1
        assert trainer.update(rollout, None)["first_log_ratio"] == pytest.approx(moved, abs=1e-4)

    looking(tmp_path, base, monkeypatch, look)


def taken(trainer: Ppo, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each minibatch, from now on."""
    found: list[list[int]] = []
    minibatch = trainer.minibatch

    def noted(rollout: Rollout, index: torch.Tensor) -> dict[str, float]:
        found.append(index.tolist())
        return minibatch(rollout, index)

    monkeypatch.setattr(trainer, "minibatch", noted)
    return found


def test_every_pass_takes_every_row_in_another_order(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(trainer: Ppo) -> None:
        minibatches = taken(trainer, monkeypatch)
        trainer.update(trainer.collect(trainer.prompts_of(0)), None)
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
        rollout = trainer.collect(trainer.prompts_of(0))
        monkeypatch.setattr(trainer, "collect", lambda prompts: rollout)
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

    looking(tmp_path, base, monkeypatch, look, temperature=0.3)  # so cold that some replies repeat themselves


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
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        found: dict[bool, set[float]] = {True: set(), False: set()}
        for name, parameter in trainer.module.named_parameters():
            if parameter.requires_grad:  # the first module is the policy's, and the value's adapter may be on it
                found[not name.startswith("0.") or "ppo_value" in name].add(rates[id(parameter)])
        assert found == {True: {1e-4}, False: {5e-3}}

    looking(tmp_path, base, monkeypatch, look, models=models, value_learning_rate=1e-4)
