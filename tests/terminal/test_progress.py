"""What the terminal shows, also a narrow one."""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune.terminal import progress


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


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """No terminal, and a line every hundredth of a second."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, force_terminal=False, width=100))
    monkeypatch.setattr(progress, "QUIET", 0.01)
    return out


def said(out: io.StringIO, wanted: int, *arguments: Any, **more: Any) -> list[str]:
    """The first lines of a task that is 1,000 on."""
    out.truncate(out.seek(0))
    begun = time.monotonic()
    with progress.task(*arguments, **more) as advance:
        advance(1000)
        while out.getvalue().count("\n") < wanted and time.monotonic() - begun < 30:
            time.sleep(0.005)
    return out.getvalue().splitlines()[:wanted]


def test_a_task_without_a_terminal_says_what_it_does_and_how_far_it_is(piped: io.StringIO) -> None:
    first, second = said(piped, 2, "tokenising", 4000)
    assert first == "tokenising 4,000 rows"
    assert second.startswith("tokenising: 1,000/4,000 rows  ETA 0:")
    first, second = said(piped, 2, "reading")
    assert first == "reading"
    assert second.startswith("reading: 1,000 rows  0:")


def test_a_task_of_no_importance_is_named_when_it_takes_long(piped: io.StringIO) -> None:
    with progress.task("looking", after=60.0):
        pass
    assert piped.getvalue() == ""
    assert said(piped, 1, "looking", after=0.01) == ["looking"]


def test_a_task_that_fails_says_no_more(piped: io.StringIO) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), progress.task("reading"):
        raise KeyError
    assert threading.active_count() == before
    assert piped.getvalue().splitlines()[0] == "reading"


def test_a_long_step_says_what_it_is_at(piped: io.StringIO) -> None:
    shown = progress.Progress("ppo")
    shown.start(10, 0)
    time.sleep(0.02)
    shown.doing("32/64 replies")
    shown.told = 0.0
    shown.step(10)
    shown.doing("held-out batch 1/7", step=10)  # after the last step there is none to be at
    assert piped.getvalue().splitlines() == ["step 1/10  32/64 replies", "step 10/10  held-out batch 1/7"]


def test_a_task_on_a_terminal_goes_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "console", Console(file=sys.stderr, force_terminal=True, width=60))
    with progress.task("loading tiny-llama"):
        pass
    text = capsys.readouterr().err
    assert "loading tiny-llama" in text
    assert text.endswith("\x1b[2K")  # the line is erased
    with progress.task("tokenising", 4000) as advance:
        advance(1000)
        time.sleep(0.5)
    assert "1,000/4,000 rows" in capsys.readouterr().err


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
