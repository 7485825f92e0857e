"""Means and their 95% intervals. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
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


Weights = tuple[Sequence[float], Sequence[float]]


def paired(
    a: Sequence[float], b: Sequence[float], lower_is_better: bool = False, resamples: int = 2000, seed: int = 0,
    weights: Weights | None = None,
) -> dict[str, Any]:  # fmt: skip
    """mean(b) - mean(a) on the same n rows with a 95% bootstrap interval over rows, and wins, losses, ties of b.

    Args:
        weights: of the rows of a and of b, what each counts in its mean.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be paired")
    before, after = np.asarray(a, float), np.asarray(b, float)
    differences, n = after - before, len(a)
    difference, ci = math.nan, [math.nan, math.nan]
    if n and weights is None:
        difference = float(differences.mean())
        ci = list(mean_interval(differences, resamples, seed, set(before) | set(after) <= {0.0, 1.0}))
    elif n and weights is not None:
        first, second = (np.asarray(part, float) for part in weights)
        sums = np.stack([before * first, first, after * second, second], 1)

        def of(parts: np.ndarray) -> np.ndarray:
            found: np.ndarray = parts[..., 2] / parts[..., 3] - parts[..., 0] / parts[..., 1]
            return found

        difference = float(of(sums.sum(0)))
        ci = list(middle(of(drawn_sums(sums, resamples, seed)), n))
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "difference": difference,
        "ci": ci,
        "n": n,
        "wins": below if lower_is_better else above,
        "losses": above if lower_is_better else below,
        "ties": n - above - below,
    }


def mean_interval(
    values: Sequence[float] | np.ndarray, resamples: int = 2000, seed: int = 0, shares: bool = False
) -> tuple[float, float]:
    """95% bootstrap interval over rows of their mean.

    shares: the values are differences of right (1) and wrong (0). Then they are drawn from the rows and one win and one
    loss more (Agresti and Min 2005): that no row of ten has changed does not say that none ever would.
    """
    known = np.asarray(values, float)
    pool = np.concatenate([np.repeat(known, 2), [1.0, -1.0, 0.0, 0.0]]) if shares else known
    drawn = drawn_sums(pool[:, None], resamples, seed, len(known))[:, 0] / len(known)
    return middle(drawn, None if shares else len(known))


def apart_interval(a: Weights, b: Weights, resamples: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval of the mean of b minus that of a, both (values, weights) of other rows."""
    means = []
    for seed, (values, weights) in enumerate((a, b)):
        counts = np.asarray(weights, float)
        sums = drawn_sums(np.stack([np.asarray(values, float) * counts, counts], 1), resamples, seed)
        means.append(sums[:, 0] / sums[:, 1])
    return middle(means[1] - means[0], min(len(a[0]), len(b[0])))


def ratio_interval(
    totals: Sequence[float], counts: Sequence[float], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95% bootstrap interval over rows of sum(totals) / sum(counts): of a loss per token."""
    below = np.maximum(np.asarray(counts, float), 1e-9)
    sums = drawn_sums(np.stack([np.asarray(totals, float), below], 1), resamples, seed)
    return middle(sums[:, 0] / sums[:, 1], len(below))


def drawn_sums(rows: np.ndarray, resamples: int = 1000, seed: int = 0, count: int | None = None) -> np.ndarray:
    """[resamples, k]: sums over `count` (all) of the rows [n, k], drawn with replacement, for bootstrap intervals of
    what sums give. Of as many rows with the same seed the same ones are drawn: pairs stay pairs."""
    generator, n = np.random.default_rng(seed), len(rows)
    return np.stack([rows[generator.integers(0, n, count or n)].sum(0) for _ in range(resamples)])


def middle(values: Sequence[float] | np.ndarray, n: int | None = None) -> tuple[float, float]:
    """The middle 95% of bootstrapped figures, of n rows somewhat more: drawn rows differ less than new ones would, and
    the few of them say little of how much (the expanded percentile interval, Hesterberg 2015)."""
    share = 0.025
    if n is not None and n > 1:
        share = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t95(n - 1))
    low, high = np.quantile(np.asarray(values, float), (share, 1 - share))
    return float(low), float(high)


def t95(freedom: int) -> float:
    """97.5% quantile of Student's t; the expansion of Abramowitz and Stegun, 26.7.5 (within 1% from 3 on)."""
    z, v = Z95, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / v + second / v**2 + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token; inf when it overflows."""
    return math.exp(loss) if loss < 700 else math.inf
