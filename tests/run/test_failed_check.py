"""A check that fails at the end of a run: the weights are kept, where nobody takes them for the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ft, tensors

from finetune.run.directory import Run

UNMOVED = {"learning_rate": 1e-30, "max_steps": 4, "save_steps": 2}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_that_did_not_move_are_kept_and_marked(recipe: Any, tmp_path: Path, method: str) -> None:
    path = recipe(train=UNMOVED, **({"adapter": {"method": "full"}} if method == "full" else {}))
    if method == "full":
        text = json.dumps({**__import__("yaml").safe_load(path.read_text()), "adapter": {"method": "full"}})
        path.write_text(text)
    done = ft("sft", path, cwd=tmp_path)
    assert done.returncode == 1
    assert "trained weights are what they were" in done.stderr
    kept = "adapter.failed" if method == "lora" else "model.failed"
    assert f"the weights are kept in run/{kept}, to be looked at" in done.stderr
    assert "next    ft" not in done.stderr
    run = Run(tmp_path / "run")
    result = json.loads(run.result.read_text())
    assert (result["status"], result["trained"], result["eval"]) == ("failed", None, {})
    assert result["failed"].startswith("trained weights are what they were")
    assert tensors(run.path / kept)
    assert not run.adapter.exists()
    assert not run.model.exists()
    assert "A check failed at the end of its training: trained weights" in (run.path / kept / "README.md").read_text()
    assert run.last_checkpoint() is not None
    commands: list[list[Any]] = [["eval", run.path, "--data", tmp_path / "rows.jsonl"], ["chat", run.path]]
    if method == "lora":
        commands += [["merge", run.path, "--output", tmp_path / "merged"]]
    for command in commands:
        said = ft(*command, stdin="")
        assert said.returncode == 2, said.stderr
        assert "is a run of which a check failed at its end (trained weights are what they were" in said.stderr
        assert f"its weights are in {run.path / kept}" in said.stderr
    assert "already holds the results of a run" in ft("sft", path).stderr
    again = ft("sft", path, "--overwrite", "--set", "train.learning_rate=0.01")
    assert again.returncode == 0, again.stderr
    assert not (run.path / kept).exists()
    assert run.done()


def test_the_failed_weights_can_be_looked_at(recipe: Any, rows: Path, tmp_path: Path) -> None:
    assert ft("sft", recipe(train=UNMOVED)).returncode == 1
    said = ft("eval", tmp_path / "run" / "adapter.failed", "--data", rows, "--limit", "2")
    assert said.returncode == 0, said.stderr
    assert "a check failed at the end of its training" in said.stderr


def test_an_unfinished_run_has_no_result(recipe: Any, rows: Path, tmp_path: Path) -> None:
    """Its weights are written, and the run was killed before result.json."""
    assert ft("sft", recipe()).returncode == 0
    run = Run(tmp_path / "run")
    run.result.unlink()
    for command in (["eval", run.path, "--data", rows], ["merge", run.path, "--output", tmp_path / "merged"]):
        said = ft(*command)
        assert said.returncode == 2
        assert "is a run that is not finished: it has no result yet" in said.stderr
    run.result.write_text('{"stage": "sf')
    said = ft("eval", run.path, "--data", rows)
    assert said.returncode == 2
    assert f"is a run whose result.json cannot be read → look at what it says; its weights are in {run.adapter}" in (
        " ".join(said.stderr.split())
    )


def test_a_damaged_best_checkpoint_leaves_the_last_weights(recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from finetune.training.trainers import Extras

    load = Extras._load_best_model

    def spoiled(self: Any) -> None:
        weights = next(Path(self.state.best_model_checkpoint).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        load(self)

    monkeypatch.setattr(Extras, "_load_best_model", spoiled)
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    done = ft("sft", recipe(data={"eval_split": 8}, train=settings))
    assert done.returncode == 1
    assert "is damaged (adapter_model.safetensors is not what was written), and these are the last" in done.stderr
    assert tensors(tmp_path / "run" / "adapter.failed")


def test_a_checkpoint_that_is_due_survives_the_evaluation_before_it(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric of the user's that breaks: the epoch before it is not lost."""
    from finetune.training.trainers import Extras

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such thing")

    settings = {"max_steps": None, "num_train_epochs": 1, "save_steps": None}
    path = recipe(data={"eval_split": 8}, train=settings)
    with monkeypatch.context() as patch:
        patch.setattr(Extras, "evaluation_loop", broken)
        assert ft("sft", path).returncode == 1
    run = Run(tmp_path / "run")
    assert run.last_checkpoint() is not None
    done = ft("sft", path, "--resume")
    assert done.returncode == 0, done.stderr
    result = json.loads(run.result.read_text())
    assert result["steps"] == int(run.complete_checkpoints()[0].name.rpartition("-")[2])
    assert result["eval"]["loss"] > 0
