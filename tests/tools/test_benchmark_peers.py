"""The arithmetic of `make bench`: figures of the hook's events, ratios of pairs, equal label tokens, the page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import compare


def run(folder: Path, task: str, name: str, number: int, seconds: float, labels: int = 10, code: int = 0) -> None:
    """Two epochs of two steps, with nine tenths of the second in passes; ft's longest rows before them."""
    work = folder / "results" / task / name / str(number)
    work.mkdir(parents=True)
    passes = [{"event": "pass", "cpu": 1.0, "spent": 5.0, "labels": 99, "shape": [1, 9], "real": 9, "loss": 9.0}]
    for step in range(4):
        passes.append(
            {"event": "pass", "cpu": 2 + step * seconds / 2, "spent": seconds * 0.45, "labels": labels,
             "shape": [2, 8], "real": 12, "loss": 4.0 - step}
        )  # fmt: skip
    events = [*passes[name != "ft" :], {"event": "end", "cpu": 50.0, "peak_mb": 100.0}]
    (work / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (work / "done").write_text(str(code))


def test_figures_are_of_the_last_epoch(tmp_path: Path) -> None:
    run(tmp_path, "sft", "ft", 0, 3.0)
    run(tmp_path, "sft", "axolotl", 0, 6.0, code=1)
    found = compare.results(tmp_path, "sft")
    assert found["axolotl"] == {0: None}, "it failed"
    figures: Any = found["ft"][0]
    assert {key: pytest.approx(figures[key]) for key in ("seconds", "inside", "labels", "positions", "tokens")} == {
        "seconds": 3.0, "inside": 2.7, "labels": 20, "positions": 32, "tokens": 24,
    }  # fmt: skip
    assert figures["losses"] == [4.0, 3.0, 2.0, 1.0]


def test_a_ratio_is_of_runs_that_followed_each_other() -> None:
    ours: dict[int, Any] = {0: {"seconds": 1.0}, 1: {"seconds": 2.0}, 3: {"seconds": 7.0}}
    theirs: dict[int, Any] = {0: {"seconds": 2.0}, 1: {"seconds": 8.0}, 2: {"seconds": 9.0}, 3: None}
    mean, low, high, pairs = compare.ratio(theirs, ours) or (0, 0, 0, 0)
    assert pairs == 2
    assert mean == pytest.approx(math.sqrt(2 * 4))
    assert low * high == pytest.approx(mean**2)
    assert high / mean == pytest.approx(math.exp(12.71 * math.log(2) / 2))  # n - 1 = 1 degree of freedom
    assert compare.ratio({5: {"seconds": 1.0}}, ours) is None
    assert compare.ratio({0: {"seconds": 3.0}}, ours) == (
        pytest.approx(3.0),
        *[pytest.approx(math.nan, nan_ok=True)] * 2,
        1,
    )


@pytest.mark.parametrize("labels", [10, 11])
def test_other_label_tokens_are_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: int) -> None:
    """The page is written all the same, and tables that were not measured stay."""
    page = tmp_path / "RESULTS.md"
    title = compare.TASKS["dpo"][0]
    page.write_text(f"# Old\n\n## {title}\n\nas it was\n\n## GPU\n\nNot run.\n")
    (tmp_path / "load").mkdir()
    about = {"parameters": 15.3e6, "chats": 32, "median": 130, "longest": 538}
    (tmp_path / "load" / "workload.json").write_text(json.dumps(about))
    for number in range(2):
        run(tmp_path, "packed", "ft", number, 3.0)
        run(tmp_path, "packed", "LLaMA-Factory", number, 6.0 + number, labels)
    monkeypatch.setattr(compare, "RESULTS", {"cpu": page})
    monkeypatch.setattr(sys, "argv", ["compare.py", "--folder", str(tmp_path), "--report"])
    if labels == 10:
        compare.main()
    else:
        with pytest.raises(SystemExit, match=r"LLaMA-Factory \(packed\) train another number of label tokens"):
            compare.main()
    text = page.read_text()
    assert "| ft | 3.00 | 1 | 2 | 20 | 32 | 4.0000 → 1.5000 | 10.0% | 100 |" in text
    assert f"## {title}\n\nas it was\n" in text
    assert text.count("## GPU") == 1
    assert ("All train the same label tokens." in text) == (labels == 10)
