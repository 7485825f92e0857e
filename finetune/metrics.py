"""Metrics as pure functions; no torch.

exact_match, json_fields          one prediction against one reference
by_group                          the rows of each group
wilson                            95% interval of a share (Wilson 1927)
ratio_interval                    95% interval of a loss per token
paired                            difference of two systems on the same rows, with a bootstrap interval
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.json_text import same, too_deep

Z95 = 1.959964


def exact_match(prediction: str, reference: str) -> bool:
    """Equal up to white space at both ends."""
    return prediction.strip() == reference.strip()


def json_fields(prediction: str, reference: str) -> dict[str, bool] | None:
    """Which fields of a JSON object are right; None if the reference is not a JSON object."""
    expected = _object(reference)
    if expected is None:
        return None
    given = _object(prediction) or {}
    return {key: key in given and same(given[key], value) for key, value in expected.items()}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return None
    return value if isinstance(value, dict) and not too_deep(value) else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def by_group(values: Sequence[float], groups: Sequence[str | None]) -> dict[str, list[float]]:
    """The values of each group's rows, groups in alphabetical order; rows of no group are left out."""
    found: dict[str, list[float]] = {group: [] for group in sorted({g for g in groups if g is not None})}
    for value, group in zip(values, groups, strict=True):
        if group is not None:
            found[group].append(value)
    return found


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of successes / n; stays inside [0, 1] and is honest at 0 and n."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(a: Sequence[float], b: Sequence[float], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """mean(b) - mean(a) on the same rows with a 95% percentile bootstrap interval, and wins, losses, ties of b."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} rows cannot be paired")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    generator, n = random.Random(seed), len(differences)
    means = sorted(mean(generator.choices(differences, k=n)) for _ in range(resamples)) if n else [math.nan]
    low, high = means[int(0.025 * (len(means) - 1))], means[math.ceil(0.975 * (len(means) - 1))]
    return {
        "difference": mean(differences),
        "ci": [low, high],
        "wins": sum(d > 0 for d in differences),
        "losses": sum(d < 0 for d in differences),
        "ties": sum(d == 0 for d in differences),
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


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token; inf when it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def fit_power_law(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """(E, B, beta) of loss = E + B / size^beta, by least squares (Hoffmann et al. 2022, arXiv:2203.15556, eq. 10).

    For a given beta the best E and B are a linear regression; beta is searched on a grid of 0.01 to 2. E and B are
    kept at or above 0. ValueError with fewer than three sizes.
    """
    if len(set(sizes)) < 3:
        raise ValueError("a power law needs at least three sizes")
    best = (math.inf, 0.0, 0.0, 0.0)
    for step in range(1, 201):
        beta = step / 100
        x = [size**-beta for size in sizes]
        mx, my = mean(x), mean(losses)
        variance = sum((v - mx) ** 2 for v in x)
        b = max(0.0, sum((v - mx) * (y - my) for v, y in zip(x, losses, strict=True)) / variance)
        e = my - b * mx
        if e < 0:  # through the origin
            e, b = 0.0, sum(v * y for v, y in zip(x, losses, strict=True)) / sum(v * v for v in x)
        error = sum((e + b * v - y) ** 2 for v, y in zip(x, losses, strict=True))
        best = min(best, (error, e, b, beta))
    return best[1:]


def doubling(
    sizes: Sequence[float], rows: Sequence[Sequence[float]], resamples: int = 300, seed: int = 0
) -> dict[str, Any]:
    """What twice the data would bring: fit of the mean losses, and a 95% bootstrap interval over the held-out rows.

    Args:
        sizes: number of training rows per run; rows: per run the losses of the same held-out rows.
    """

    def gain(losses: Sequence[float]) -> float:
        _, b, beta = fit_power_law(sizes, losses)
        largest = max(sizes)
        return b * (largest**-beta - (2 * largest) ** -beta)

    generator, n = random.Random(seed), len(rows[0])
    gains = []
    for _ in range(resamples):
        drawn = generator.choices(range(n), k=n)
        gains.append(gain([mean([losses[i] for i in drawn]) for losses in rows]))
    gains.sort()
    e, b, beta = fit_power_law(sizes, [mean(losses) for losses in rows])
    low, high = gains[int(0.025 * (resamples - 1))], gains[math.ceil(0.975 * (resamples - 1))]
    return {"E": e, "B": b, "beta": beta, "gain": gain([mean(losses) for losses in rows]), "ci": [low, high]}
