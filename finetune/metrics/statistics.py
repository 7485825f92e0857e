"""Means and their 95% intervals. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959964


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson (1927) score interval of successes / n; stays inside [0, 1] and is honest at 0 and n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(
    a: Sequence[float], b: Sequence[float], lower_is_better: bool = False, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """mean(b) - mean(a) on the same rows with a 95% percentile bootstrap interval, and wins, losses, ties of b."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be paired")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    generator, n = random.Random(seed), len(differences)
    means = sorted(mean(generator.choices(differences, k=n)) for _ in range(resamples)) if n else [math.nan]
    low, high = means[int(0.025 * (len(means) - 1))], means[math.ceil(0.975 * (len(means) - 1))]
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "difference": mean(differences),
        "ci": [low, high],
        "wins": below if lower_is_better else above,
        "losses": above if lower_is_better else below,
        "ties": n - above - below,
    }


def ratio_interval(
    totals: Sequence[float], counts: Sequence[float], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile bootstrap interval over rows of sum(totals) / sum(counts): of a loss per token."""
    generator = np.random.default_rng(seed)
    above, below = np.asarray(totals, float), np.maximum(np.asarray(counts, float), 1e-9)
    drawn = [generator.integers(0, len(above), len(above)) for _ in range(resamples)]
    low, high = np.quantile([above[i].sum() / below[i].sum() for i in drawn], (0.025, 0.975))
    return float(low), float(high)


def drawn_sums(rows: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """[resamples, k]: sums over rows [n, k] drawn with replacement, for bootstrap intervals of what sums give."""
    generator, n = np.random.default_rng(seed), len(rows)
    return np.stack([rows[generator.integers(0, n, n)].sum(0) for _ in range(resamples)])


def middle(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of bootstrapped figures."""
    low, high = np.quantile(np.asarray(values, float), (0.025, 0.975))
    return float(low), float(high)


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token; inf when it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
