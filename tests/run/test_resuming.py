"""An unfinished run goes on with the same recipe only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import recipe

from finetune.errors import UserError
from finetune.run.opening import open_run
from finetune.run.resuming import changed_keys, check_resumable, without_places


def test_resume_names_the_changed_keys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder, seed=1)):
        pass
    check_resumable(recipe(folder, seed=1))
    with pytest.raises(UserError) as caught:
        check_resumable(recipe(folder, seed=2, max_steps=5))
    assert [problem.key for problem in caught.value.problems] == ["train.max_steps", "train.seed"]


def test_changed_keys() -> None:
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 1}) == ["a.c", "d"]


def test_sets_may_lie_elsewhere_and_not_be_others() -> None:
    def recipe(data: Any) -> Any:
        return without_places({"eval": {"data": data}})

    assert recipe("a") == recipe("b")
    assert recipe({"zh": "a", "old": {"path": "b", "general": True}}) == recipe(
        {"zh": "c", "old": {"path": "d", "general": True}}
    )
    assert recipe(["a", "b"]) == recipe(["c", "d"])
    for one, other in (
        ("a", ["a", "b"]),
        ({"zh": "a"}, {"en": "a"}),
        ({"zh": "a"}, {"zh": {"path": "a", "general": True}}),
    ):
        assert recipe(one) != recipe(other)
