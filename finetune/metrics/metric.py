"""What a metric is: a row of METRICS, and how its figures come out of measured rows. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from finetune.metrics.statistics import mean_interval, ratio_interval, weighted_mean, wilson

T = TypeVar("T")
Row = Mapping[str, Any]
"""A measured row: see `evaluation.generation.Evaluation.rows`."""


class Whole(NamedTuple):
    """A figure of all rows together."""

    value: float
    interval: Sequence[float] | None = None
    how: str | None = None
    """With what it was computed, for figures that others want to compute again."""


def always(rows: Sequence[Row]) -> bool:
    return True


def never(rows: Sequence[Row]) -> bool:
    return False


@dataclass(frozen=True)
class Metric:
    name: str
    kinds: tuple[str, ...]
    """The kinds of held-out rows that it is measured on: answers, pairs, unpaired, text, choices."""
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
    of_all: Callable[[Sequence[Row]], Whole | None] | None = None
    """What is reported in place of the mean, of all rows."""
    against: Callable[[Sequence[Row], Sequence[Row]], dict[str, Any]] | None = None
    """Of such a figure: what `statistics.paired` says, of the same rows by a first and a second model."""
    normalises: str = ""
    """What of answer and reference does not count, printed with the figures."""
    needs: str = "prediction"
    """What must be computed for it: prediction, loss, reward, policy (the rewards of dpo and kto), letter, full (of
    multiple choice); "" where it is there anyway."""
    columns: tuple[str, ...] = ()
    """Of the row's file, those that must be there."""
    unasked: Callable[[Sequence[Row]], bool] = always
    """Of rows with their references: whether it is measured on them when no metric is named."""
    package: str | None = None
    """What of the extra `eval` must be installed."""

    def named(self, group: str | None = None) -> str:
        return f"{self.name}/{group}" if group else self.name

    def of(self, row: Row) -> float | None:
        """Of a row, from what `score` noted where it did."""
        noted = row.get("metrics") or {}
        return noted[self.name] if self.name in noted else self.function(row)

    def values(self, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
        """(values, weights) of the rows that have one."""
        found = [(value, self.weight(row)) for row in rows if (value := self.of(row)) is not None]
        return [value for value, _ in found], [weight for _, weight in found]

    def mean(self, rows: Sequence[Row]) -> float | None:
        values, weights = self.values(rows)
        return weighted_mean(values, weights) if values else None

    def figures(self, rows: Sequence[Row], group: str | None = None) -> dict[str, Any]:
        """{NAME, NAME_ci, NAME_how}, of the rows of a group NAME/GROUP, …, and NAME_n where not all rows have it; {}
        where none has."""
        name = self.named(group)
        if self.of_all is not None:
            whole = self.of_all(rows)
            parts = {} if whole is None else {name: whole.value, f"{name}_ci": whole.interval, f"{name}_how": whole.how}
            return {key: part for key, part in parts.items() if part is not None}
        values, weights = self.values(rows)
        if not values:
            return {}
        found: dict[str, Any] = {name: weighted_mean(values, weights)}
        if self.interval is not None:
            found[f"{name}_ci"] = list(self.interval(values, weights))
        if len(values) < len(rows):
            found[f"{name}_n"] = len(values)
        return found

    def groups(self, rows: Sequence[Row]) -> dict[str, list[Row]]:
        """The rows that have it, of each group."""
        known = [row for row in rows if self.by_group and self.of(row) is not None]
        return by_group(known, [row.get("group") for row in known])


def by_group(values: Sequence[T], groups: Sequence[str | None]) -> dict[str, list[T]]:
    """The values of each group's rows, groups in alphabetical order; rows of no group are left out."""
    found: dict[str, list[T]] = {group: [] for group in sorted({g for g in groups if g is not None})}
    for value, group in zip(values, groups, strict=True):
        if group is not None:
            found[group].append(value)
    return found


def of_all(name: str, kinds: tuple[str, ...], function: Callable[[Sequence[Row]], Any], **more: Any) -> Metric:
    """A figure of all rows together: a number, a Whole, or None. Compared only where `against` says how."""

    def whole(rows: Sequence[Row]) -> Whole | None:
        found = function(rows)
        return found if found is None or isinstance(found, Whole) else Whole(found)

    return Metric(name, kinds, lambda row: None, None, compared="against" in more, of_all=whole, **more)


# --- intervals of means ---


def share(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    return wilson(int(sum(values)), len(values))


def weighted(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    return ratio_interval([v * w for v, w in zip(values, weights, strict=True)], weights)


def drawn_rows(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    return mean_interval(values)


def share_or_mean(values: Sequence[float], weights: Sequence[float]) -> Sequence[float]:
    """Where every row is right or wrong that of a share."""
    return share(values, weights) if set(values) <= {0.0, 1.0} else drawn_rows(values, weights)


# --- functions of a row ---


def entry(key: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(key)


def of_texts(function: Callable[[str, str], float | None]) -> Callable[[Row], float | None]:
    """Of (answer, reference); None where one of them is missing."""

    def of_row(row: Row) -> float | None:
        prediction, reference = row.get("prediction"), row.get("reference")
        if prediction is None or reference is None:
            return None
        value = function(prediction, reference)
        return None if value is None else float(value)

    return of_row
