"""An unfinished run goes on with the same recipe only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import finished, recipe

from finetune.errors import UserError
from finetune.run.checkpoints import complete
from finetune.run.opening import open_run
from finetune.run.resuming import changed_keys, check_resumable, goes_further, without_places


def test_resume_names_the_changed_keys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder, seed=1)):
        pass
    check_resumable(recipe(folder, seed=1))
    with pytest.raises(UserError) as caught:
        check_resumable(recipe(folder, seed=2, num_train_epochs=2.5))
    said = [f"{problem.key}: {problem.message}" for problem in caught.value.problems]
    assert said == [
        "train.num_train_epochs: differs from the run to resume: 3.0 then, 2.5 now",
        "train.seed: differs from the run to resume: 1 then, 2 now",
    ]


def test_what_changes_no_weight_and_more_steps_are_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder, max_steps=5)):
        pass
    for free in ({"logging_steps": 1}, {"save_steps": 2}, {"save_total_limit": 5}, {"max_steps": 6}):
        check_resumable(recipe(folder, **{"max_steps": 5, **free}))
    for other in ({"max_steps": 4}, {"max_steps": None, "num_train_epochs": 50}, {"learning_rate": 1.0}):
        with pytest.raises(UserError, match="differs from the run to resume"):
            check_resumable(recipe(folder, **{"max_steps": 5, **other}))
    assert goes_further(recipe(folder, max_steps=6))
    assert not goes_further(recipe(folder, max_steps=5))
    assert not goes_further(recipe(tmp_path / "none", max_steps=6))


def test_a_finished_run_goes_on_for_more_steps(tmp_path: Path) -> None:
    """From then on it is not finished, and it is again when it has them."""
    folder = tmp_path / "run"
    finished(folder)
    (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    complete(folder / "checkpoints" / "checkpoint-3")
    with (
        pytest.raises(UserError, match="this run is finished, there is nothing to resume"),
        open_run(recipe(folder), resume=True),
    ):
        pass
    with open_run(recipe(folder, num_train_epochs=4), resume=True) as run:
        assert not run.result.exists()
        assert (run.path / ".replaced" / "result.json").exists()
        run.finish({"stage": "sft", "status": "done"})
    assert run.done()
    assert not (run.path / ".replaced").exists()


@pytest.mark.parametrize(
    ("length", "more"), [({"num_train_epochs": 2.5}, "num_train_epochs=5"), ({"max_steps": 4}, "max_steps=8")]
)
def test_what_a_finished_run_is_told_to_ask_for_is_taken(tmp_path: Path, length: dict[str, Any], more: str) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder, **length)) as run:
        (run.checkpoints / "checkpoint-3").mkdir(parents=True)
        complete(run.checkpoints / "checkpoint-3")
        run.finish({"stage": "sft"})
    with (
        pytest.raises(UserError, match=f"as with --set train.{more}$"),
        open_run(recipe(folder, **length), resume=True),
    ):
        pass
    key, _, value = more.partition("=")
    assert goes_further(recipe(folder, **{key: int(value)}))


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
