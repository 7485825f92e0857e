"""What a finished run says, and what it advises to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe.file import check
from finetune.run.directory import Run
from finetune.training.finish import Words, next_commands, summary

RESULT: dict[str, Any] = {
    "seconds": 61.0, "steps": 7, "train_loss": 0.5, "eval": {"loss": 0.25, "accuracy": 0.9}, "trainable_parameters": 1,
    "total_parameters": 4,
}  # fmt: skip


def recipe(method: str = "lora", **data: Any) -> Any:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "m"}, "output": {"dir": "r"}, "data": {"train": "d", **data},
        "adapter": {"method": method},
    }  # fmt: skip
    return check(values, "sft")


def test_next_commands() -> None:
    held = recipe(eval_split=0.1)
    assert next_commands(held, "r", answers=True) == [["eval", "r", "--compare-base"], ["chat", "--adapter", "r"]]
    assert next_commands(held, "r", answers=False) == [["eval", "r"]], "a reward model has only scores"
    assert next_commands(recipe("full"), "r", answers=True) == [["chat", "--model", "r"]]


@pytest.mark.parametrize(
    ("words", "gist"),
    [
        (Words(), "training loss 0.5000, held-out loss 0.2500"),
        (Words(lambda held_out: f"accuracy {held_out['accuracy']}"), "accuracy 0.9"),
    ],
)
def test_the_figure_that_says_most(words: Words, gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary(recipe(), Run(tmp_path), tmp_path / "adapter", RESULT, words)
    said = capsys.readouterr().err
    assert f"7 steps, {gist}" in said
    assert "trained 1 of 4 parameters (25.00%)" in said
    assert "no rows were held out" in said


def test_the_hint_names_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary(recipe(eval_split=0.1), Run(tmp_path), tmp_path / "adapter", RESULT, Words(hint="use it as {run}"))
    said = capsys.readouterr().err
    assert f"use it as {tmp_path}" in said.replace("\n", "")
    assert "no rows were held out" not in said
