"""What more data would bring: the law of loss over rows, fitted. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from finetune.metrics.statistics import mean


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
