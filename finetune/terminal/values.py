"""Figures for people: four digits, large numbers with separators, intervals beside their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len


def shown(value: Any) -> str:
    """A number for people: four digits, large ones with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def padded(text: str, width: int) -> str:
    """`text` in that many columns of a terminal, of which a Chinese character takes two."""
    return text + " " * (width - cell_len(text))


def with_interval(value: Any, interval: Sequence[Any] | None) -> str:
    """`0.933 [0.882, 0.963]`"""
    return shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")


def with_intervals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> `0.933 [0.882, 0.963]`, each with its interval where it has one."""
    return {
        name: with_interval(value, metrics.get(f"{name}_ci"))
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def in_cell(value: Any) -> str:
    """A value of a recipe or a result in a table: [value, low, high] as a figure with its interval, null as a dash."""
    if isinstance(value, list | tuple):
        number = len(value) == 3 and all(isinstance(one, float) for one in value)
        return with_interval(value[0], value[1:]) if number else ", ".join(map(in_cell, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else shown(value)
