"""What `Ppo.collect` and `Ppo.minibatch` hand to the arithmetic of `rl`: each against a plain loop over tokens.

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

from finetune.adapters.seats import seated
from finetune.ppo import Ppo, Rollout
from finetune.rollout import response_logits, token_values

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
    sums = dict.fromkeys(("loss", "value_loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
    every = lengths(rollout)
    total = sum(every[i] for i in index)
    for i in index:
        part = rollout.replies.rows(torch.tensor([i]))
        with seated(actors.policy) as model:
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
            (objective / total).backward()
        with seated(actors.value) as model:
            values, objective = token_values(model, actors.value_head, part)[0], torch.zeros(())
            for t in range(every[i]):
                old, target = rollout.values[i, t], rollout.returns[i, t]
                near = values[t].clamp(old - c.cliprange_value, old + c.cliprange_value)
                objective = objective + 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2)
            sums["value_loss"] += float(objective.detach()) / total
            (c.vf_coef * objective / total).backward()
    return sums
