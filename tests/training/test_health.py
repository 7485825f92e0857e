"""A step that goes wrong stops the run with its number, its rows and advice; the last good checkpoint is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train, write_rows
from transformers import Trainer

from finetune.errors import RunError
from finetune.run.checkpoints import damage
from finetune.run.directory import Run
from finetune.training.health import HIGH_STEPS, ZERO_STEPS, Health, named, rows_of_step, samples_of
from finetune.training.trainers import Extras

Change = Callable[[int, torch.Tensor], torch.Tensor]


def test_a_loss_above_that_of_a_model_that_knows_nothing() -> None:
    health, limit = Health("sft", 1000), math.log(1000) + 1
    assert health.limit() == limit
    for step in range(1, HIGH_STEPS):
        health.look(step, limit + 0.1 if step > 1 else 2.0, 1.0)
    health.look(HIGH_STEPS, 3.0, 1.0)  # it came back
    for step in range(10, 9 + HIGH_STEPS):
        health.look(step, limit + 0.1, 1.0)
    with pytest.raises(RunError, match=r"exploded: 8\.008 at step 20, and 2 at first"):
        health.look(20, limit + 0.1, 1.0)
    assert Health("dpo", 1000).limit() == 10.0
    far = Health("sft", 1000)
    far.look(1, 9.0, 1.0)
    assert far.limit() == 27.0, "weighted turns have a loss of another scale"


def test_zero_gradients_beside_a_loss() -> None:
    health = Health("dpo", 1000)
    for step in range(1, 20):
        health.look(step, 0.0, 0.0)  # a hinge that is satisfied
        health.look(step, 0.5, None)  # not measured, or left out by loss scaling
    for _ in range(ZERO_STEPS - 1):
        health.look(20, 0.5, 0.0)
    with pytest.raises(RunError, match="exactly zero for 3 steps up to step 21: nothing is learned"):
        health.look(21, 0.5, 0.0)


def test_rows_in_words() -> None:
    assert named([("/x/a b.jsonl", 3)]) == "row 3 of a b.jsonl"
    assert named([("a", 3), ("a", 1), ("b", 2), ("a", 9), ("a", 4)]) == "rows 3, 1, 9 of a and 2 more"


def changed(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """The loss of every pass is what `change` makes of it, given the step from 1."""
    loss = Extras.compute_loss

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(self.state.global_step + 1, loss(self, *args, **kwargs))

    monkeypatch.setattr(Extras, "compute_loss", other)


def stopped(path: Path) -> tuple[Run, str, list[dict[str, Any]]]:
    """(run, what it said, the rows that it kept)."""
    done = ft("sft", path, cwd=path.parent)
    assert done.returncode == 1, done.stderr
    run = Run(path.parent / "run")
    assert not run.result.exists()
    assert all(damage(checkpoint) is None for checkpoint in run.complete_checkpoints())
    kept = [json.loads(line) for line in (run.path / "failed_batch.jsonl").read_text().splitlines()]
    return run, done.stderr, kept


EACH = {"max_steps": 16, "logging_steps": 100, "save_steps": 1, "save_total_limit": 1, "effective_batch_size": 4}


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_none(
    recipe: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """One row in the data makes it so: it is among those that are named, and written with its text."""
    seen: list[str] = []
    step = Trainer.training_step

    def spoiled(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        text = self.processing_class.decode(inputs["input_ids"].flatten())
        if "say 17<" not in text:
            return step(self, model, inputs, *more, **named)
        seen.append(text)
        return step(self, model, inputs, *more, **named) * math.nan

    monkeypatch.setattr(Trainer, "training_step", spoiled)
    run, said, kept = stopped(recipe(train=EACH, data={"packing": packing, "max_length": 96}))
    number = [row["row"] for row in kept if "say 17<" in row["input"]]
    assert number == [18]
    assert {row["file"] for row in kept} == {str(rows)}
    assert all(row["input"].split("<|im_end|>")[0] in seen[0] for row in kept)
    assert "loss became nan at step " in said
    more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
    assert f" of rows.jsonl{more}, in run/failed_batch.jsonl" in said
    assert "ft data check" in said
    last = run.last_checkpoint()
    if last is not None:  # not when it is in the first step
        assert f"the last checkpoint before is kept: run/checkpoints/{last.name}" in said
        assert f"at step {int(last.name.rpartition('-')[2]) + 1}:" in said


def test_an_explosion_keeps_the_last_good_checkpoint(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although one is saved after every step, and one is kept."""
    changed(monkeypatch, lambda step, loss: loss * (100 if step > 4 else 1))
    run, said, kept = stopped(recipe(train=EACH))
    assert "the loss has exploded" in said
    assert f"at step {4 + HIGH_STEPS}" in said
    assert len(kept) == 4
    assert "checkpoint-4" in {path.name for path in run.complete_checkpoints()}


@pytest.mark.parametrize("after", [2, 2 + HIGH_STEPS - 1])
def test_a_resumed_run_knows_how_it_began(recipe: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Stopped before or while the loss explodes, it ends at the same step with the same words."""
    changed(monkeypatch, lambda step, loss: loss * (100 if step > 2 else 1))
    path = recipe(train=EACH)
    whole, said, _ = stopped(path)
    step = 2 + HIGH_STEPS
    assert f"at step {step}, and " in said
    for folder in whole.complete_checkpoints():
        if int(folder.name.rpartition("-")[2]) > after:
            (folder / "complete").unlink()
    again = ft("sft", path, "--resume", cwd=path.parent)
    assert again.returncode == 1
    assert told(again.stderr) == told(said)


def told(stderr: str) -> str:
    """What was said of the explosion, without the checkpoint that is kept."""
    return next(line for line in stderr.splitlines() if "exploded" in line).partition("; the step had")[0]


def test_gradients_that_go_out(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while: the proof of the first steps has seen them."""
    changed(monkeypatch, lambda step, loss: loss if step < 6 else loss.detach() + 0 * loss)
    _, said, _ = stopped(recipe(train=EACH))
    assert f"exactly zero for 3 steps up to step {5 + ZERO_STEPS}: nothing is learned" in said


@pytest.mark.parametrize("stage", ["sft", "sft packed", "dpo"])
def test_rows_of_a_step_are_those_it_had(
    recipe: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """In every step of two epochs, whose last is shorter, cut into passes."""
    seen: dict[int, str] = {}
    expected: dict[int, list[str]] = {}
    step = Trainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        now = self.state.global_step + 1
        seen[now] = seen.get(now, "") + self.processing_class.decode(inputs["input_ids"].flatten())
        if now not in expected:
            rows = session.rows.train
            numbers = samples_of(self, rows_of_step(self, now), 96, rows)
            column = "input_ids" if "input_ids" in rows.column_names else "chosen_ids"
            expected[now] = [self.processing_class.decode(rows[n][column][-12:]) for n in numbers]
        return step(self, model, inputs, *more, **named)

    from finetune.training import session as life

    held: list[Any] = []
    train_with = life.Session.train
    monkeypatch.setattr(life.Session, "train", lambda self, *a, **k: held.append(self) or train_with(self, *a, **k))
    monkeypatch.setattr(Trainer, "training_step", watched)
    train_settings = {
        "max_steps": None, "num_train_epochs": 2, "effective_batch_size": 12, "per_device_train_batch_size": 3,
    }  # fmt: skip
    path = recipe(train=train_settings, data={"packing": stage == "sft packed", "max_length": 96})

    class Session:
        @property
        def rows(self) -> Any:
            return held[0].rows

    session = Session()
    if stage == "dpo":
        from finetune.commands import dpo
        from finetune.recipe.file import load
        from finetune.recipe.stages import DpoRecipe

        pairs = [{"prompt": f"say {i}", "chosen": f"{i} yes " * (1 + i % 3), "rejected": "no"} for i in range(30)]
        values = json.loads(json.dumps(__import__("yaml").safe_load(path.read_text())))
        values |= {
            "stage": "dpo",
            "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "max_length": 64},
        }
        path.write_text(json.dumps(values))
        monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")
        dpo.run(load(str(path), DpoRecipe))
    else:
        train(path)
    assert len(expected) > 4
    for number, ends in expected.items():
        assert ends, number
        assert all(end in seen[number] for end in ends), number
