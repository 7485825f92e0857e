"""What `ft eval` measures, and the statistics beside it. No torch. A new metric is a row of METRICS."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from finetune.json_text import same, too_deep

Z95 = 1.959964
T = TypeVar("T")


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


def by_group(values: Sequence[T], groups: Sequence[str | None]) -> dict[str, list[T]]:
    """The values of each group's rows, groups in alphabetical order; rows of no group are left out."""
    found: dict[str, list[T]] = {group: [] for group in sorted({g for g in groups if g is not None})}
    for value, group in zip(values, groups, strict=True):
        if group is not None:
            found[group].append(value)
    return found


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


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood per token; inf when it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


Row = Mapping[str, Any]
"""A measured row: see `evaluation.generation.Evaluation.rows`."""


@dataclass(frozen=True)
class Metric:
    name: str
    kinds: tuple[str, ...]
    """The kinds of held-out rows that it is measured on: answers, pairs, unpaired, text."""
    function: Callable[[Row], float | None]
    """Of a row; None where the row has no such figure. Reported is the mean."""
    interval: Callable[[Sequence[float], Sequence[float]], Sequence[float]] | None
    """Of (values, weights) of the rows: the 95% interval of their mean."""
    lower_is_better: bool = False
    weight: Callable[[Row], float] = lambda row: 1
    """What a row counts in the mean."""
    by_group: bool = False
    """Whether it is reported and compared for each group of rows, too."""
    compared: bool = True
    """Whether models are compared in it, row by row."""
    of_all: Callable[[Sequence[Row]], float | None] | None = None
    """What is reported in place of the mean, of all rows; without interval."""

    def named(self, group: str | None = None) -> str:
        return f"{self.name}/{group}" if group else self.name

    def values(self, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        """(values, weights) of the rows that have one."""
        found = [(value, self.weight(row)) for row in rows if (value := self.function(row)) is not None]
        return [value for value, _ in found], [weight for _, weight in found]

    def mean(self, rows: Sequence[Row]) -> float | None:
        values, weights = self.values(rows)
        return weighted_mean(values, weights) if values else None

    def figures(self, rows: Sequence[Row], group: str | None = None) -> dict[str, Any]:
        """{NAME, NAME_ci}, of the rows of a group NAME/GROUP, …; {} where no row has it."""
        name = self.named(group)
        if self.of_all is not None:
            value = self.of_all(rows)
            return {} if value is None else {name: value}
        values, weights = self.values(rows)
        if not values:
            return {}
        found: dict[str, Any] = {name: weighted_mean(values, weights)}
        if self.interval is not None:
            found[f"{name}_ci"] = list(self.interval(values, weights))
        return found

    def groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """The rows that have it, of each group."""
        known = [row for row in rows if self.by_group and self.function(row) is not None]
        return by_group(known, [row.get("group") for row in known])


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def share(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    return wilson(int(sum(values)), len(values))


def weighted(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    return ratio_interval([v * w for v, w in zip(values, weights, strict=True)], weights)


def drawn_rows(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    interval: Sequence[float] = paired([0.0] * len(values), values)["ci"]
    return interval


def entry(key: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(key)


def right(row: Row) -> float | None:
    """Whether the answer is the reference; None without one."""
    return None if row["reference"] is None else float(exact_match(row["prediction"], row["reference"]))


def fields(row: Row) -> dict[str, bool]:
    """Which fields of a JSON reference are right; {} where it is none."""
    return (json_fields(row["prediction"], row["reference"]) if row["reference"] is not None else None) or {}


def tokens(row: Row) -> float:
    return float(row["loss_tokens"])


def loss_to_lower(row: Row) -> float | None:
    """Nats per token; None of an unpaired answer that is not to be learned."""
    loss: float | None = row["loss"]
    return None if row.get("label") is False else loss


LOSS = Metric(
    "loss", ("answers", "pairs", "unpaired", "text"), loss_to_lower, weighted, lower_is_better=True, weight=tokens
)
BAD_LOSS = Metric(
    "bad_loss", ("unpaired",), lambda row: row["loss"] if row["label"] is False else None, weighted, weight=tokens,
    compared=False,
)  # fmt: skip


def perplexity_of(rows: Sequence[Row]) -> float | None:
    loss = LOSS.mean(rows)
    return None if loss is None else perplexity(loss)


def margin_of_losses(rows: Sequence[Row]) -> float | None:
    desired, undesired = LOSS.mean(rows), BAD_LOSS.mean(rows)
    return None if desired is None or undesired is None else undesired - desired


def margin_of_rewards(rows: Sequence[Row]) -> float | None:
    known = [row for row in rows if row["answer_reward"] is not None]
    halves = [[row["answer_reward"] for row in known if row["label"] is side] for side in (True, False)]
    return mean(halves[0]) - mean(halves[1]) if all(halves) else None


def of_all(name: str, kinds: tuple[str, ...], function: Callable[[Sequence[Row]], float | None]) -> Metric:
    """A figure of all rows together."""
    return Metric(name, kinds, lambda row: None, None, compared=False, of_all=function)


METRICS: list[Metric] = [
    Metric("exact_match", ("answers",), right, share, by_group=True),
    Metric("preference_accuracy", ("pairs",), entry("correct"), share, by_group=True),
    Metric("reward_accuracy", ("unpaired",), entry("correct"), share, by_group=True),
    Metric("margin", ("pairs",), entry("margin"), weighted, compared=False),
    Metric(
        "field_accuracy", ("answers",), lambda row: mean([*fields(row).values()]) if fields(row) else None, None,
        weight=lambda row: len(fields(row)), compared=False,
    ),
    LOSS,
    of_all("perplexity", LOSS.kinds, perplexity_of),
    BAD_LOSS,
    of_all("margin", ("unpaired",), margin_of_losses),
    Metric(
        "reward_accuracy", ("pairs",), lambda row: float(row["reward_margin"] > 0) if "reward_margin" in row else None,
        share, compared=False,
    ),
    Metric("reward_margin", ("pairs",), entry("reward_margin"), weighted, compared=False),
    of_all("reward_margin", ("unpaired",), margin_of_rewards),
    Metric("reward", ("answers",), entry("reward"), drawn_rows),
]  # fmt: skip


def measure(kind: str, rows: Sequence[Row]) -> dict[str, Any]:
    """{NAME, NAME_ci, NAME/GROUP, NAME/GROUP_ci, …}, and `groups`: how many rows of each the first metric is of."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        if kind in metric.kinds:
            found |= metric.figures(rows)
            for group, members in metric.groups(rows).items():
                found |= metric.figures(members, group)
                found.setdefault("groups", {}).setdefault(group, len(members))
    return found


def compared(kind: str, figures: Sequence[Mapping[str, Any]]) -> list[tuple[Metric, str | None]]:
    """(metric, group of rows or None for all) of those in which models with these figures can be compared."""
    groups = [None, *figures[0].get("groups", ())]
    found = [
        (metric, group)
        for metric in METRICS
        if metric.compared and kind in metric.kinds
        for group in (groups if metric.by_group else [None])
    ]
    return [(metric, group) for metric, group in found if all(metric.named(group) in each for each in figures)]


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
