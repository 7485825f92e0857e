"""PPO's arithmetic against values computed in float64; every sign and mask matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.rl import arithmetic

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "ppo_golden.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(params=range(len(CASES)))
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    found = CASES[request.param]
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items() if isinstance(v, list)}
    return {**tensors, "params": found["params"], "expected": found["expected"]}


def close(value: torch.Tensor, expected: Any) -> bool:
    return torch.allclose(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


def computed(case: dict[str, Any], **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The whole chain as the trainer runs it."""
    c, p = {**case, **changed}, case["params"]
    kl = arithmetic.per_token_kl(c["logp"], c["ref_logp"], c["mask"])
    rewards = arithmetic.token_rewards(c["scores"], kl, c["mask"], p["beta"])
    advantage, returns = arithmetic.advantages(rewards, c["values"], c["mask"], p["gamma"], p["lam"])
    whitened = arithmetic.whiten(advantage, c["mask"])
    policy = arithmetic.policy_loss(c["new_logp"], c["logp"], whitened, c["mask"], p["cliprange"])
    value = arithmetic.value_loss(c["new_values"], c["values"], returns, c["mask"], p["cliprange_value"])
    return {
        "token_rewards": rewards,
        "advantages": advantage,
        "returns": returns,
        "whitened": whitened,
        "policy_loss": policy.loss,
        "value_loss": value,
        "clip_fraction": policy.clip_fraction,
        "approx_kl": policy.approx_kl,
        "mean_k1": arithmetic.masked_mean(kl, c["mask"]),
        "mean_k3": arithmetic.masked_mean(arithmetic.kl_estimate(c["logp"], c["ref_logp"], c["mask"]), c["mask"]),
    }


def test_golden(case: dict[str, Any]) -> None:
    values = computed(case)
    wrong = [name for name, expected in case["expected"].items() if not close(values[name], expected)]
    assert wrong == []


def test_padding_never_matters(case: dict[str, Any]) -> None:
    """Whatever stands behind the end of a reply changes nothing."""
    noise = {k: torch.where(case["mask"].bool(), case[k], torch.full_like(case[k], 7.5))
             for k in ("logp", "ref_logp", "new_logp", "values", "new_values")}  # fmt: skip
    clean, dirty = computed(case), computed(case, **noise)
    for name in case["expected"]:
        assert torch.allclose(clean[name], dirty[name], atol=1e-12), name


@pytest.mark.parametrize("sign", [1, -1])
def test_each_function_masks_by_itself(sign: int) -> None:
    """Nothing relies on another having masked before; not even where numbers overflow."""
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    junk = sign * 1e4 * (1 - mask)
    a, b, scores = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([1.0, -2.0])
    kl = arithmetic.per_token_kl(a + junk, b, mask)
    assert torch.equal(kl, arithmetic.per_token_kl(a, b, mask))
    assert torch.equal(arithmetic.kl_estimate(a + junk, b, mask), arithmetic.kl_estimate(a, b, mask))
    rewards = arithmetic.token_rewards(scores, a - b, mask, 0.1)
    assert torch.equal(rewards, arithmetic.token_rewards(scores, a - b + junk, mask, 0.1))
    assert (rewards[mask == 0] == 0).all()
    clean = arithmetic.advantages(rewards, a, mask, 0.9, 0.8)
    for found, expected in zip(arithmetic.advantages(rewards + junk, a + junk, mask, 0.9, 0.8), clean, strict=True):
        assert torch.equal(found, expected)
        assert (found[mask == 0] == 0).all()
    losses = (arithmetic.policy_loss(a + noise, b, scores[:, None] * a, mask, 0.2) for noise in (junk, 0 * junk))
    assert torch.equal(*(torch.stack(list(loss)) for loss in losses))
    assert torch.equal(
        arithmetic.explained_variance(a + junk, b + 2 * junk, mask), arithmetic.explained_variance(a, b, mask)
    )
    assert torch.equal(
        arithmetic.value_loss(a + junk, b, a - b, mask, 0.2), arithmetic.value_loss(a, b, a - b, mask, 0.2)
    )


def test_estimator_is_never_negative_and_zero_when_equal() -> None:
    logp, ref = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    mask = torch.ones(4, 9, dtype=torch.float64)
    assert (arithmetic.kl_estimate(logp, ref, mask) >= 0).all()
    assert (arithmetic.kl_estimate(logp, logp, mask) == 0).all()


def test_gradient_points_to_better_replies() -> None:
    """A positive advantage raises the log-probability, a negative one lowers it; outside of the clip range neither."""
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.0, 0.0, 0.5, -0.5]], requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    arithmetic.policy_loss(new, old, advantage, torch.ones(1, 4), 0.2).loss.backward()
    assert new.grad is not None
    assert new.grad[0, 0] < 0 < new.grad[0, 1]
    assert new.grad[0, 2] == new.grad[0, 3] == 0


def test_entropy() -> None:
    uniform = arithmetic.entropy(torch.zeros(2, 3, 8))
    assert torch.allclose(uniform, torch.full((2, 3), 8.0).log())
    assert arithmetic.entropy(torch.tensor([[[50.0, 0.0]]])).item() == pytest.approx(0, abs=1e-6)


def test_explained_variance() -> None:
    returns, mask = torch.randn(3, 5), torch.ones(3, 5)
    assert arithmetic.explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert arithmetic.explained_variance(torch.zeros(3, 5), returns, mask).item() == pytest.approx(0)


def test_beta_follows_the_target() -> None:
    assert arithmetic.adapted_beta(0.1, kl=12.0, target=6.0, rows=50, horizon=1000) == pytest.approx(0.1 * 1.01)
    assert arithmetic.adapted_beta(0.1, kl=6.0, target=6.0, rows=50, horizon=1000) == pytest.approx(0.1)
    assert arithmetic.adapted_beta(0.1, kl=0.0, target=6.0, rows=50, horizon=1000) == pytest.approx(0.1 * 0.99)


def test_last_token() -> None:
    assert arithmetic.last_real(torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])).tolist() == [1, 0, 2]
