"""The run directory: nothing is overwritten, nothing half-written looks finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe import SftRecipe
from finetune.recipe_file import check
from finetune.run import Run, changed_keys, check_output, check_resumable, open_run


def recipe(folder: Path, **train: object) -> SftRecipe:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "m"}, "data": {"train": "d"}, "train": train,
        "output": {"dir": str(folder)},
    }  # fmt: skip
    built = check(values, "sft")
    assert isinstance(built, SftRecipe)
    return built


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder)) as run:
        run.finish({"stage": "sft"})
    assert json.loads(run.result.read_text())["versions"]["torch"]
    with pytest.raises(UserError, match="already holds the results"):
        check_output(folder, overwrite=False, resume=False)
    with pytest.raises(UserError, match="nothing to resume"):
        check_output(folder, overwrite=False, resume=True)
    (folder / "mine.txt").write_text("keep")
    with open_run(recipe(folder), overwrite=True):
        assert not run.result.exists()
    assert (folder / "mine.txt").read_text() == "keep"


def test_foreign_files_block_a_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="already holds files"):
        check_output(tmp_path, overwrite=False, resume=False)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "x", overwrite=False, resume=False)


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    folder = recipe(tmp_path / "run")
    with open_run(folder), pytest.raises(UserError, match="another process"), open_run(folder, overwrite=True):
        pass


def test_resume_names_the_changed_keys(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder, seed=1)):
        pass
    check_resumable(recipe(folder, seed=1))
    with pytest.raises(UserError) as caught:
        check_resumable(recipe(folder, seed=2, max_steps=5))
    assert [problem.key for problem in caught.value.problems] == ["train.max_steps", "train.seed"]


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (5, 10, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert run.last_checkpoint() is None
    for step in (5, 10):
        (run.checkpoints / f"checkpoint-{step}" / "complete").touch()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-10"
    with pytest.raises(UserError, match="no complete checkpoint"):
        check_output(tmp_path / "other", overwrite=False, resume=True)


def test_changed_keys() -> None:
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 1}) == ["a.c", "d"]


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    run.forget_after(2)
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
