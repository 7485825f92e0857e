"""What the terminal shows, also a narrow one."""

from __future__ import annotations

import io
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune import progress


@pytest.mark.parametrize("width", [40, 80, 200])
def test_samples_fit(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """The score, the end of the prompt and the start of the reply are there at any width."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, width=width))
    long = "看工单回答。花了616元。客户刘涛。订单里的白色水杯和订单不一样，请尽快处理。" * 3 + "多少钱？"
    progress.samples("step 1", [(long, "not stated " * 20, -12.345), ("a", "b", 1.0)])
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    row = next(line for line in lines if "-12.35" in line)
    assert "多少钱？ │" in row.replace("  │", " │")
    assert "│ not" in row
    assert any("+1.00" in line for line in lines)


def test_a_task_without_a_terminal_says_what_it_does_and_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(progress, "console", Console(file=sys.stderr, force_terminal=False, width=100))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.task("tokenising", 4000) as advance:
        advance(500)
        advance(500)
        advance(3000)
    assert capsys.readouterr().err.splitlines() == ["tokenising 4,000 rows", "tokenising: 1,000/4,000 rows  ETA 0:33"]


def test_a_task_on_a_terminal_goes_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "console", Console(file=sys.stderr, force_terminal=True, width=60))
    with progress.task("loading tiny-llama"):
        pass
    text = capsys.readouterr().err
    assert "loading tiny-llama" in text
    assert text.endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"loss": 0.5, "rewards/margins": 1.25, "rewards/accuracies": 0.75},
            "loss 0.5000  margin 1.250  accuracy 0.750",
        ),
        ({"loss": 0.5, "margin": -1.0, "accuracy": 0.5}, "margin -1.000  accuracy 0.500"),
        ({"eval_loss": 0.4, "eval_rewards/margins": 2.0, "rewards/margins": 9.0}, "held-out loss 0.4000  margin 2.000"),
        ({"loss": 0.5}, "loss 0.5000  1.0 GB"),
    ],
)
def test_learning_from_preferences_shows_margin_and_accuracy(
    row: dict[str, float], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "console", Console(file=sys.stderr, force_terminal=False, width=100))
    shown = progress.Progress("dpo")
    shown.start(10, 0)
    shown.log({"step": 1, "peak_memory_gb": 1.0, **row})
    assert expected in capsys.readouterr().err
