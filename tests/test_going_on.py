"""Ctrl-C says how to go on, a dry run says what a run would, and the last step is on record."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import train, write_rows

from finetune.child import PART
from finetune.cli import main
from finetune.commands import sft
from finetune.data import audit
from finetune.early import evaluating, training
from finetune.errors import Interrupted
from finetune.models import tokenizers
from finetune.recipe.file import load
from finetune.recipe.stages import RECIPES, SftRecipe
from finetune.run.checkpoints import complete
from finetune.run.directory import Run
from finetune.run.opening import open_run
from finetune.terminal import progress
from finetune.training import reference, session
from finetune.training.callbacks import Recorder

Recipes = Callable[..., Path]
STAGES = ("pretrain", "sft", "reward", "dpo", "kto", "ppo")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; (exit code, stderr)."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ft", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(str(ended.value.code)), capsys.readouterr().err

    return run


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def again_of(text: str) -> list[str]:
    """The command that a message ends with, as a shell reads it."""
    return shlex.split(text.strip().splitlines()[-1].partition(" with ft ")[2])


def written(tmp_path: Path, base: Path, stage: str, **sections: Any) -> Path:
    """A recipe of `stage` over a handful of rows, in a folder with a space."""
    folder = tmp_path / "my folder"
    folder.mkdir(exist_ok=True)
    pair = {"prompt": "say 1", "chosen": "yes", "rejected": "no"}
    row: dict[str, Any] = {
        "pretrain": {"text": "yes and no and yes and no and yes " * 4},
        "sft": {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "yes"}]},
        "kto": {"prompt": "say 1", "completion": "yes", "label": True},
    }.get(stage, pair)
    rows = [json.loads(json.dumps(row).replace("say 1", f"say {i}")) for i in range(6)]
    if stage == "kto":
        rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "max_length": 64},
        "train": {"max_steps": 2, "effective_batch_size": 16, "learning_rate": 1e-3},
        "adapter": {"method": "lora", "r": 4}, "output": {"dir": str(folder / "the run")},
    }  # fmt: skip
    if stage == "ppo":
        (folder / "rule.py").write_text("def f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
        values["reward"] = {"functions": [f"{folder / 'rule.py'}:f"]}
        values["ppo"] = {"max_new_tokens": 4}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "the recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


# --- Ctrl-C ---


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_while_loading_says_how_to_start_again(
    tmp_path: Path, base: Path, stage: str, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]]
) -> None:
    path = written(tmp_path, base, stage)
    monkeypatch.setattr(tokenizers, "load_tokenizer", interrupt)
    code, said = typed(stage, "--recipe", str(path), "--set", "train.seed=3", "--overwrite")
    assert code == 130
    assert "interrupted before there was a checkpoint; start again with ft" in said
    assert again_of(said) == [stage, "--recipe", str(path), "--set", "train.seed=3", "--overwrite"]
    assert not (path.parent / "the run").exists()


def test_ctrl_c_while_reading_data(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    monkeypatch.setattr(audit, "screen", interrupt)
    place = str(tmp_path / "a run")
    code, said = typed("sft", str(recipe()), "--output", place)
    assert (code, again_of(said)) == (130, ["sft", "--recipe", str(recipe()), "--output", place])


def test_ctrl_c_before_the_first_checkpoint(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]]
) -> None:
    """The run's folder holds something by now: the command takes it over, and works."""
    path = str(recipe())
    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_trainer", interrupt)
        code, said = typed("sft", path)
    assert (code, again_of(said)) == (130, ["sft", "--recipe", path, "--overwrite"])
    training.recipe(path, "sft", [], None, resume=False, overwrite=True)


def test_a_second_ctrl_c_after_a_checkpoint(recipe: Recipes, tmp_path: Path) -> None:
    checked = load(str(recipe(output={"dir": str(tmp_path / "a run")})), SftRecipe)

    def begin() -> None:
        with open_run(checked) as run:
            (run.checkpoints / "checkpoint-3").mkdir(parents=True)
            complete(run.checkpoints / "checkpoint-3")
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        begin()
    assert again_of(str(stopped.value)) == ["sft", "--recipe", str(tmp_path / "a run" / "recipe.yaml"), "--resume"]


@pytest.mark.parametrize("part", [True, False])
def test_a_part_of_a_command_does_not_say_what_to_type_next(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]], part: bool
) -> None:
    """Neither at its end nor when it is stopped: the whole says it."""
    monkeypatch.setattr(progress, "advising", True)
    path, before = str(recipe(train={"max_steps": 1})), [PART] if part else []
    code, said = typed(*before, "sft", path)
    assert code == 0
    assert "done in " in said
    assert ("next    ft " in said) == ("no rows were held out" in said) == (not part)
    monkeypatch.setattr(evaluating, "evaluated", interrupt)
    for command in (["sft", path, "--overwrite"], ["eval", "runs/a"]):
        monkeypatch.setattr(training, "recipe", interrupt)
        code, said = typed(*before, *command)
        assert (code, "start again with ft" in said) == (130, not part)


def test_ctrl_c_elsewhere_repeats_the_command(
    monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setattr(evaluating, "evaluated", interrupt)
    assert typed("eval", "runs/a b", "--limit", "3") == (
        130, "interrupted; start again with ft eval 'runs/a b' --limit 3\n",
    )  # fmt: skip


@pytest.mark.parametrize("stop", [interrupt, "signal"])
def test_ctrl_c_in_a_comparison(
    recipe: Recipes, rows: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]], stop: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    from finetune.commands import compare

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr(compare, "run", interrupt if stop is interrupt else stopped)
    path, folder = str(recipe(eval={"data": str(rows)})), str(tmp_path / "a comparison")
    code, said = typed("compare", path, "--methods", "lora,bitfit", "--set", "train.seed=3", "--output", folder)
    assert code == 130
    again = again_of(said)
    assert again[:3] == ["compare", "--recipe", path]
    assert {"--methods", "lora,bitfit", "train.seed=3", folder} <= set(again)


# --- a dry run ---


class Announced(Exception):
    pass


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_warns_as_the_run_does(
    tmp_path: Path, base: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = load(str(written(tmp_path, base, stage, data={"max_length": 600})), RECIPES[stage])
    monkeypatch.setattr(reference, "cache_folder", lambda: tmp_path / "cache")
    found: list[list[str]] = []
    plan = session.Session.plan

    def noted(self: Any, *arguments: Any, **more: Any) -> None:
        plan(self, *arguments, **more)
        found.append(self.notes)
        if len(found) == 2:
            raise Announced

    monkeypatch.setattr(session.Session, "plan", noted)
    stage_of = importlib.import_module(f"finetune.commands.{stage}")
    stage_of.run(recipe, dry_run=True)
    with pytest.raises(Announced):
        stage_of.run(recipe)
    dry, real = found
    assert dry == real
    assert any("updates" in line for line in dry)


def test_a_dry_run_beside_an_earlier_run_says_what_it_takes(
    recipe: Recipes, typed: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = recipe(data={"packing": True}, train={"max_steps": 1})
    run = train(path)
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*")}
    code, said = typed("sft", str(path), "--dry-run")
    assert code == 0
    assert "warning: " in said
    assert "already holds the results of a run → use --output DIR or --overwrite; this dry run goes on" in said
    assert "packing: whether documents in one row are apart is tried when the model is loaded" in said
    assert "nothing was written" in said
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("*")} == before
    run.result.unlink()
    _, said = typed("sft", str(path), "--dry-run")
    assert "use --resume to go on, or --overwrite to start again, or --output DIR; this dry run goes on" in said
    code, said = typed("sft", str(path), "--dry-run", "--output", str(path))
    assert code == 2, "that is no folder, and no flag helps"


# --- the last step ---


def test_the_last_step_is_on_record(recipe: Recipes) -> None:
    rows = train(recipe(train={"max_steps": 3, "logging_steps": 100})).read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == [3]
    assert rows[0]["loss"] > 0


def test_a_step_at_which_an_evaluation_may_end_the_run_is_on_record(tmp_path: Path) -> None:
    def logs(step: int, evaluates: bool, may_stop: bool, epoch: bool = False) -> bool:
        recorder = Recorder(Run(tmp_path), SimpleNamespace(step=lambda _: None), may_stop)  # type: ignore[arg-type]
        control = SimpleNamespace(should_log=False, should_evaluate=evaluates)
        event = recorder.on_epoch_end if epoch else recorder.on_step_end
        event(None, SimpleNamespace(global_step=step, max_steps=9), control)
        return bool(control.should_log)

    assert logs(4, evaluates=True, may_stop=True)
    assert logs(4, evaluates=True, may_stop=True, epoch=True)
    assert not logs(4, evaluates=True, may_stop=False)
    assert not logs(4, evaluates=False, may_stop=True)
    assert logs(9, evaluates=False, may_stop=False)


def test_ctrl_c_where_something_is_kept_says_one_thing(
    monkeypatch: pytest.MonkeyPatch, typed: Callable[..., tuple[int, str]]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted("interrupted with 4 answers kept", add=["--resume"], drop=["--overwrite"])

    monkeypatch.setattr(evaluating, "evaluated", stopped)
    for words in (["eval", "runs/a"], ["eval", "runs/a", "--resume"]):
        assert typed(*words) == (130, "interrupted with 4 answers kept; go on with ft eval runs/a --resume\n")
