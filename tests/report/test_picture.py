"""loss.png, and the numbers of every table: for people, with intervals beside their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.report.picture import plot
from finetune.terminal.values import in_cell, shown, with_intervals

pytestmark = pytest.mark.whole


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        ("done", "done"),
        (True, "True"),
        (2e-7, "2e-07"),
        (12345.678, "12,346"),
    ],
)
def test_numbers(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [([0.5, 0.4, 0.6], "0.5 [0.4, 0.6]"), ([1, 2, 3], "1, 2, 3"), (None, "-"), (["a", "b"], "a, b"), (True, "true")],
)
def test_cells(value: Any, text: str) -> None:
    assert in_cell(value) == text


def test_intervals_stand_beside_their_values() -> None:
    assert with_intervals({"loss": 0.5, "loss_ci": [0.4, 0.6], "groups": {"a": 1}, "n": 300}) == {
        "loss": "0.5 [0.4, 0.6]",
        "n": "300",
    }


@pytest.mark.parametrize(("last", "scale"), [(0.01, "log"), (1.0, "linear"), (0.0, "linear")])
def test_a_loss_that_falls_far_has_a_log_axis(
    last: float, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot

    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    plot([{"step": 1, "loss": 2.0}, {"step": 2, "loss": last}], tmp_path / "loss.png", "a $title")
    (figure,) = drawn
    monkeypatch.undo()
    panel = figure.axes[0]
    assert panel.get_yscale() == scale
    assert panel.get_title(loc="left") == "a $title"
    assert all(float(tick).is_integer() for tick in figure.axes[-1].get_xticks())
    pyplot.close(figure)
