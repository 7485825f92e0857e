"""The table of docs/plan.md: planned peaks against those that `benchmarks/memory.py` measured last (memory.json)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

pytestmark = pytest.mark.whole
CASES = {**memory.DEVELOPMENT, **memory.HELD_OUT}
MEASURED: dict[str, dict[str, Any]] = json.loads(memory.RESULTS.read_text(encoding="utf-8"))


DAILY = list(CASES)[::3]


@pytest.mark.parametrize("name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_plan_is_within_15_percent_of_what_was_measured(name: str, tmp_path: Path) -> None:
    *_, plan = memory.planned(name, CASES[name], tmp_path)
    assert plan.tensors == pytest.approx(MEASURED[name]["measured"], rel=memory.WITHIN)
    assert plan.tensors == pytest.approx(MEASURED[name]["planned"], rel=0.01), "measure it again: the plan has changed"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_15_percent_of_what_is_measured(name: str, tmp_path: Path) -> None:
    found = memory.run(name, CASES[name], tmp_path)
    assert abs(found["error"]) <= memory.WITHIN
    assert found["measured"] == pytest.approx(MEASURED[name]["measured"], rel=0.05), "memory.json says otherwise"


def test_there_are_as_many_cases_as_promised() -> None:
    """20 and 8, from 100 million parameters on, over a 30-fold range, SmolLM2 and a vocabulary of 262k among them."""
    sizes = {MEASURED[name]["parameters"] for name in CASES}
    assert len(memory.DEVELOPMENT) >= 20
    assert len(memory.HELD_OUT) >= 8
    assert min(sizes) >= 100e6
    assert max(sizes) / min(sizes) > 30
    assert {shape["vocab_size"] for shape in memory.SHAPES.values()} >= {49_152, 262_144}


def test_the_page_shows_what_was_measured() -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for group in (memory.DEVELOPMENT, memory.HELD_OUT):
        assert memory.table(group, MEASURED) in page
    errors = [abs(MEASURED[name]["error"]) for name in memory.DEVELOPMENT]
    for name, said in (
        ("README.md", "off by {:.1%} on average, by {:.1%} at most"),
        ("README.zh-CN.md", "平均误差 {:.1%}，最大 {:.1%}"),
    ):
        readme = (ROOT / name).read_text(encoding="utf-8")
        assert said.format(sum(errors) / len(errors), max(errors)) in readme
        assert re.search(rf"\b{len(errors)} (?:cases|例)", readme)
