"""A part of the rows, drawn by seed."""

from __future__ import annotations

from typing import Any

from finetune.data.samples import drawn


def rows(count: int) -> Any:
    return iter(range(count))


def test_rows_are_drawn_by_seed_and_stay_in_order() -> None:
    first: list[Any] = list(drawn(rows(1000), 100, seed=1))
    assert first == sorted(set(first))
    assert len(first) == 100
    assert first == list(drawn(rows(1000), 100, seed=1))
    other: list[Any] = list(drawn(rows(1000), 100, seed=2))
    assert len({*first} & {*other}) < 25, "10 of 100 by chance"
    assert 400 < sum(first) / 100 < 600, "from everywhere"


def test_more_data_only_replaces() -> None:
    """A row that was not drawn from fewer is not drawn from more, but for the new ones."""
    few, more = set(drawn(rows(500), 50, seed=1)), set(drawn(rows(600), 50, seed=1))
    assert {row for row in more if row < 500} <= few  # type: ignore[operator]
    assert list(drawn(rows(7), 50, seed=1)) == list(range(7))
