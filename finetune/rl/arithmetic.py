"""The arithmetic of PPO: pure functions on tensors, each with its equation. The trainer uses these and no others.

Shapes: B rows (one reply each), T positions (the longest reply). `mask` is 1 on the tokens of a reply, its end token
included, and 0 on padding; sums and means run over real tokens only. Log-probabilities are those of the sampled
tokens, in nats, at the temperature of the sampling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from finetune.models.score_head import last_real


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the positions where mask is 1. [B, T], [B, T] -> scalar."""
    return (values * mask).sum() / mask.sum()


def per_token_kl(logp: torch.Tensor, ref_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log pi(a) - log ref(a) per token, k1 of Schulman 2020 (joschu.net/blog/kl-approx.html). [B, T] -> [B, T]."""
    return (logp - ref_logp).masked_fill(mask == 0, 0.0)


def kl_estimate(logp: torch.Tensor, ref_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d per token, d = log pi - log ref: k3 of the same note, unbiased and never negative. -> [B, T]."""
    d = (logp - ref_logp).masked_fill(mask == 0, 0.0)  # before it can overflow: what stands on padding is no number
    return torch.exp(-d) - 1 + d


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, beta: float) -> torch.Tensor:
    """-beta KL_t, plus the reply's score at its last token (Ziegler et al. 2019, arXiv:1909.08593, eq. 2).

    Args:
        scores: [B]; kl: [B, T] per-token KL. Returns [B, T].
    """
    rewards = -beta * kl * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_real(mask)] += scores.to(rewards.dtype)
    return rewards


def advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), both [B, T]; generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t (eq. 10), A_t = delta_t + gamma lam A_{t+1} (eq. 16), with V = 0 behind the
    last token; returns are A + V.
    """
    values, result = values * mask, torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        result[:, t] = following
    return result, result + values


def whiten(values: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """(x - mean) / sqrt(var + epsilon), population variance over real tokens; 0 on padding. [B, T] -> [B, T]."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + epsilon) * mask


class PolicyLoss(NamedTuple):
    loss: torch.Tensor
    clip_fraction: torch.Tensor
    """Share of tokens where the clipped term is the larger one."""
    approx_kl: torch.Tensor
    """Mean of (new - old)^2 / 2: how far this update has moved the policy."""


def policy_loss(
    new_logp: torch.Tensor, old_logp: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> PolicyLoss:
    """mean max(-A r, -A clip(r, 1 - eps, 1 + eps)), r = exp(new - old) (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        new_logp, old_logp, advantage, mask: [B, T].
    """
    moved = (new_logp - old_logp).masked_fill(mask == 0, 0.0)
    ratio = torch.exp(moved)
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(
        masked_mean(torch.maximum(plain, clipped), mask),
        masked_mean((clipped > plain).to(ratio.dtype), mask),
        masked_mean(moved**2 / 2, mask),
    )


def value_loss(
    new_values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """Half the mean of max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2). [B, T] each -> scalar.

    The clip of Schulman et al. 2017, eq. 7, put on values: not in the paper, but in its authors' code (Engstrom et al.
    2020, arXiv:2005.12729, section 3).
    """
    clipped = torch.clamp(new_values, old_values - cliprange, old_values + cliprange)
    return 0.5 * masked_mean(torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2), mask)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """-sum p log p of the distribution at each position. [B, T, V] -> [B, T]."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(torch.exp(logp) * logp).sum(dim=-1)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - Var(R - V) / Var(R): 1 when the value head foresees the returns, 0 when it knows only their mean."""

    def variance(x: torch.Tensor) -> torch.Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


def adapted_beta(beta: float, kl: float, target: float, rows: int, horizon: int) -> float:
    """The KL coefficient after a rollout of `rows` replies (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2); beta <- beta (1 + e rows / horizon).
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * rows / horizon)
