"""What every training stage promises of its life: stop, go on, checkpoints, held-out figures, numbers that are none."""

from __future__ import annotations

import importlib
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tensors, write_rows
from rl_kit import comparable, logged, ppo_recipe, rule, run_ppo

from finetune.errors import Interrupted, RunError, UserError
from finetune.recipe.file import load
from finetune.recipe.stages import RECIPES
from finetune.run.checkpoints import damage, known_of, seal
from finetune.run.directory import Run
from finetune.run.guards import check_output
from finetune.terminal.progress import Progress
from finetune.training.trainers import Extras

TRAINERS = ("sft", "pretrain", "dpo", "kto", "reward")
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference log-probabilities of a test stay with the test."""
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")


def words(i: int) -> str:
    return " ".join("ab" * (1 + j % 3) for j in range(1 + i * 7 % 6))


def data_of(stage: str, folder: Path) -> Path:
    """40 rows of different lengths."""
    rows: list[dict[str, Any]] = []
    for i in range(40):
        asked, good, bad = f"say {i}", f"{i} yes {words(i)}", f"{i} no {words(i + 3)}"
        rows.append(
            {
                "sft": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": good}]},
                "pretrain": {"text": f"{asked} {good} {bad} {good}"},
                "kto": {"prompt": asked, "completion": good if i % 3 else bad, "label": bool(i % 3)},
            }.get(stage, {"prompt": asked, "chosen": good, "rejected": bad})
        )
    return write_rows(folder / f"{stage}.jsonl", rows)


@pytest.fixture
def write(tmp_path: Path, base: Path) -> Write:
    def write(stage: str, name: str = "run", **sections: Any) -> Path:
        data = tmp_path / f"{stage}.jsonl"
        dropout = {} if stage in ("dpo", "kto") else {"lora_dropout": 0.1}  # it is off there
        values: dict[str, Any] = {
            "version": 1, "stage": stage, "model": {"name": str(base), "dtype": "float32"},
            "data": {"train": str(data if data.exists() else data_of(stage, tmp_path)), "max_length": 64},
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, **dropout},
            "train": {
                "max_steps": 7, "effective_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 2, "save_steps": 3,
                "save_total_limit": 9, "warmup_steps": 0,
            },
            "output": {"dir": str(tmp_path / name)},
        }  # fmt: skip
        for key, section in sections.items():
            values[key] = {**values.get(key, {}), **section}
        if values["adapter"]["method"] == "full":
            values["adapter"] = {"method": "full"}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def run(path: Path, *overrides: str, resume: bool = False) -> Run:
    stage = yaml.safe_load(path.read_text())["stage"]
    recipe: Any = load(str(path), RECIPES[stage], overrides)
    importlib.import_module(f"finetune.commands.{stage}").run(recipe, resume=resume)
    return Run(Path(recipe.output.dir))


def result(found: Run) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(found.result.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return read


def stopped_after(whole: Run, name: str, step: int) -> Run:
    """A copy that looks as if it had been killed with the checkpoint of `step` as its last."""
    copy = Run(shutil.copytree(whole.path, whole.path.with_name(name)))
    copy.result.unlink()
    for folder in copy.complete_checkpoints():
        if int(folder.name.rpartition("-")[2]) > step:
            (folder / "complete").unlink()
    return copy


def same_run(a: Run, b: Run) -> None:
    assert comparable(a) == comparable(b)
    for key in ("train_loss", "steps", "epochs", "eval", *(["seen_tokens"] if "seen_tokens" in result(a) else [])):
        assert result(a)[key] == result(b)[key], key
    ours, theirs = (tensors(r.adapter if r.adapter.exists() else r.model) for r in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("stage", TRAINERS)
def test_a_resumed_run_is_the_uninterrupted_one(write: Write, stage: str) -> None:
    """Between two logged steps, and after the last step, which lies inside an epoch: no step more."""
    sections = {"data": {"eval_split": 4}, "train": {"eval_steps": 3}}
    whole = run(write(stage, "whole", **sections))
    assert [row["step"] for row in whole.read_metrics() if "loss" in row] == [2, 4, 6, 7]  # the last one, too
    for step in (3, 7):
        broken = stopped_after(whole, f"broken{step}", step)
        same_run(
            run(write(stage, broken.path.name, data={"eval_split": 4}, train={"eval_steps": 3}), resume=True), whole
        )


def test_a_resumed_run_of_ppo_is_the_uninterrupted_one(tmp_path: Path, base: Path) -> None:
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 9}
    whole = run_ppo(ppo_recipe(tmp_path, base, "whole", train=settings))
    for step in (1, 3):
        broken = stopped_after(whole, f"broken{step}", step)
        same_run(run_ppo(ppo_recipe(tmp_path, base, broken.path.name, train=settings), resume=True), whole)


def test_a_resumed_run_counts_its_time_and_tokens_on(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, counted = run(write("sft", "whole")), []
    broken = stopped_after(whole, "broken", 3)
    begun = broken.checkpoints / "checkpoint-3"
    known = known_of(begun)
    assert 0 < known["counters"]["seconds"] < result(whole)["seconds"]
    known["counters"]["seconds"] = 5000.0
    seal(begun, known)
    monkeypatch.setattr(Progress, "rate", lambda self, tokens: counted.append(tokens) or 1.0)
    again = run(write("sft", "broken"), resume=True)
    assert 5000 < result(again)["seconds"] < 5100
    logged_at = logged(again, "num_tokens")  # after steps 2, 4, 6 and 7
    assert known["counters"]["tokens"] > logged_at[0]
    steps = zip(logged_at[1:], [known["counters"]["tokens"], *logged_at[1:]], strict=False)
    assert counted == [now - before for now, before in steps], "none of those before the stop"


def test_early_stopping_counts_on_after_a_stop(write: Write) -> None:
    """Patience that has run out is out also after a kill; the best checkpoint is known where the run lies now."""
    settings = {
        "max_steps": 30, "learning_rate": 1.0, "lr_scheduler_type": "constant", "eval_steps": 1, "save_steps": 1,
        "early_stopping_patience": 3,
    }  # fmt: skip
    whole = run(write("sft", "whole", data={"eval_split": 4}, train=settings))
    last = result(whole)["steps"]
    assert last < 30
    for step in (last - 1, last):
        broken = stopped_after(whole, f"broken{step}", step)
        again = run(write("sft", broken.path.name, data={"eval_split": 4}, train=settings), resume=True)
        same_run(again, whole)
        assert Path(result(again)["best_checkpoint"]).parent == again.checkpoints


# --- checkpoints ---


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garbled(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    path.write_bytes(bytes(data))


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut weights": lambda folder: truncated(next(folder.glob("*.safetensors"))),
    "other weights": lambda folder: garbled(next(folder.glob("*.safetensors"))),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "empty optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(b""),
    "bad json": lambda folder: next(folder.glob("*state.json")).write_text("{"),
    "half a mark": lambda folder: truncated(folder / "complete"),
    "an empty mark": lambda folder: (folder / "complete").write_bytes(b""),
    "a mark of another": lambda folder: shutil.copy(folder.parent / "other" / "complete", folder),
    "another figure in the mark": lambda folder: replaced(folder / "complete", b'"threads": "', b'"threads": "9'),
    "another key in the mark": lambda folder: replaced(folder / "complete", b'"inputs"', b'"input5"'),
    "another name": lambda folder: replaced(folder / "complete", b"checkpoint-3", b"checkpoint-2"),
}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Run]]:
    """A run of a trainer and one of PPO, to be copied and spoiled."""
    folder = tmp_path_factory.mktemp("finished")
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 9, "logging_steps": 1, "effective_batch_size": 4}
    values = {
        "version": 1, "stage": "sft", "model": {"name": str(base), "dtype": "float32"}, "train": settings,
        "data": {"train": str(data_of("sft", folder)), "max_length": 64}, "output": {"dir": str(folder / "sft")},
    }  # fmt: skip
    sft = folder / "sft.yaml"
    sft.write_text(yaml.safe_dump(values))
    ppo = ppo_recipe(folder, base, train={**settings, "effective_batch_size": 16})
    return {"sft": (sft, run(sft)), "ppo": (ppo, run_ppo(ppo))}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen(finished: dict[str, tuple[Path, Run]], tmp_path: Path, stage: str, what: str) -> None:
    folder = Path(shutil.copytree(finished[stage][1].checkpoints / "checkpoint-3", tmp_path / "checkpoint-3"))
    shutil.copytree(finished[stage][1].checkpoints / "checkpoint-2", tmp_path / "other")
    assert damage(folder) is None
    DAMAGES[what](folder)
    assert damage(folder) is not None


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    finished: dict[str, tuple[Path, Run]], tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = finished[stage]
    place = tmp_path / "moved"  # the run may lie elsewhere, too
    copy = Run(shutil.copytree(whole.path, place))
    copy.result.unlink()
    truncated(copy.checkpoints / "checkpoint-3" / "optimizer.pt")
    again = run(path, f"output.dir={place}", resume=True)
    same_run(again, whole)
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-3 is damaged (optimizer.pt is not what was written): going on from checkpoint-2" in said
    assert damage(copy.checkpoints / "checkpoint-3") is None, "written anew"


def test_only_damaged_checkpoints(finished: dict[str, tuple[Path, Run]], tmp_path: Path) -> None:
    path, whole = finished["sft"]
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    copy.result.unlink()
    for folder in copy.complete_checkpoints():
        truncated(folder / "optimizer.pt")
    with pytest.raises(UserError, match="start again with --overwrite") as caught:
        run(path, f"output.dir={copy.path}", resume=True)
    assert len(caught.value.problems) == 3
    assert len(copy.complete_checkpoints()) == 3, "nothing was touched"


def test_a_damaged_mark_hides_no_change(
    finished: dict[str, tuple[Path, Run]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest mark is unreadable, and the one before says what the run was begun with, moved or not."""
    path, whole = finished["sft"]
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    copy.result.unlink()
    truncated(copy.checkpoints / "checkpoint-3" / "complete")
    other = tmp_path / "other.jsonl"
    other.write_bytes(Path(yaml.safe_load(path.read_text())["data"]["train"]).read_bytes().replace(b"yes", b"yea", 1))
    with pytest.raises(UserError, match=r"other\.jsonl: data\.train: has another content"):
        run(path, f"output.dir={copy.path}", f"data.train={other}", resume=True)
    same_run(run(path, f"output.dir={copy.path}", resume=True), whole)
    assert "complete is not what was written" in " ".join(capsys.readouterr().err.split())


def test_a_finished_run_stays_finished_when_it_cannot_go_on(
    finished: dict[str, tuple[Path, Run]], tmp_path: Path
) -> None:
    """More steps are asked for, and none of its checkpoints can be read."""
    path, whole = finished["sft"]
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    for folder in copy.complete_checkpoints():
        truncated(folder / "optimizer.pt")
    before = {p: p.read_bytes() for p in copy.path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.pt is not what was written"):
        run(path, f"output.dir={copy.path}", "train.max_steps=5", resume=True)
    assert {p: p.read_bytes() for p in copy.path.rglob("*") if p.is_file() and p.name != ".lock"} == before


@pytest.mark.parametrize("what", ["a file", "no mark can be read"])
def test_what_stands_in_the_way_is_told_first(finished: dict[str, tuple[Path, Run]], tmp_path: Path, what: str) -> None:
    """Before anything is loaded, and not at the step whose checkpoint would go there."""
    _, whole = finished["sft"]
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    copy.result.unlink()
    if what == "a file":
        (copy.checkpoints / "checkpoint-9").write_text("mine")
    for folder in copy.complete_checkpoints() if what != "a file" else ():
        (folder / "complete").write_bytes(b"")
    expected = "stands where a checkpoint goes" if what == "a file" else "complete is not what was written"
    with pytest.raises(UserError, match=expected):
        check_output(copy.path, overwrite=False, resume=True)


def test_a_best_checkpoint_that_is_gone_is_told(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """When the run goes on, and at its end: the last weights are not taken for the best."""
    settings = {
        "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "max_steps": 2, "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    sections: dict[str, Any] = {"data": {"eval_split": 4}, "train": settings}
    whole = run(write("sft", "whole", **sections))
    best = Path(result(whole)["best_checkpoint"]).name
    assert best == "checkpoint-1"
    broken = stopped_after(whole, "broken", 2)
    shutil.rmtree(broken.checkpoints / best)
    with pytest.raises(RunError, match=f"{best} is damaged"):
        run(write("sft", "broken", **sections), resume=True)
    assert result(broken)["status"] == "failed"
    assert "the best checkpoint so far" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("stage", [*TRAINERS, "ppo"])
def test_there_is_always_a_complete_checkpoint(
    write: Write, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Looked at whenever a folder is deleted or the trainer writes."""
    place, seen = tmp_path / "run" / "checkpoints", []
    unlink = Path.unlink

    def looked(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "complete":
            rest = [f for f in place.glob("checkpoint-*/complete") if f.parent != path.parent]
            seen.append(bool(rest))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", looked)
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1}
    path = ppo_recipe(tmp_path, base, "run", train=settings) if stage == "ppo" else write(stage, train=settings)
    found = run(path)
    assert seen == [True, True]
    assert [p.name for p in found.checkpoints.glob("checkpoint-*")] == ["checkpoint-3"]
    assert damage(found.checkpoints / "checkpoint-3") is None


# --- what the run reads ---


def test_changed_content_is_noticed_and_a_moved_copy_is_not(
    finished: dict[str, tuple[Path, Run]], tmp_path: Path, base: Path
) -> None:
    path, whole = finished["sft"]
    recipe = yaml.safe_load(path.read_text())
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    copy.result.unlink()
    data = Path(shutil.copy(recipe["data"]["train"], tmp_path / "moved.jsonl"))
    model = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    moved = (f"output.dir={copy.path}", f"data.train={data}", f"model.name={model}")

    rows = data.read_bytes()
    data.write_bytes(rows.replace(b"yes", b"yea", 1))
    with pytest.raises(UserError, match=r"moved\.jsonl: data\.train: has another content"):
        run(path, *moved, resume=True)
    data.write_bytes(rows)

    template = model / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text.replace("<|im_start|>", "<|im_start|> ", 1))
    with pytest.raises(UserError, match=r"model\.chat_template: has another content"):
        run(path, *moved, resume=True)
    template.write_text(text)

    from safetensors.torch import save_file

    weights = tensors(model)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, model / "model.safetensors")
    with pytest.raises(UserError, match=r"elsewhere: model\.name: has another content"):
        run(path, *moved, resume=True)
    shutil.copy(base / "model.safetensors", model)

    with pytest.raises(UserError, match=r"data\.max_length: differs from the run to resume"):
        run(path, *moved, "data.max_length=63", resume=True)
    same_run(run(path, *moved, resume=True), whole)
    assert yaml.safe_load((copy.path / "recipe.yaml").read_text())["data"]["train"] == [str(data)]


def test_changed_rules_and_prompts_of_ppo(finished: dict[str, tuple[Path, Run]], tmp_path: Path) -> None:
    path, whole = finished["ppo"]
    copy = Run(shutil.copytree(whole.path, tmp_path / "copy"))
    copy.result.unlink()
    recipe = yaml.safe_load(path.read_text())
    prompts = Path(shutil.copy(recipe["data"]["train"], tmp_path / "prompts.jsonl"))
    file, _, name = recipe["reward"]["functions"][0].rpartition(":")
    scorer = Path(shutil.copy(file, tmp_path / "rule.py"))
    moved = (f"output.dir={copy.path}", f"data.train={prompts}", f"reward.functions=[{scorer}:{name}]")
    scorer.write_text(Path(file).read_text() + "# changed\n")
    with prompts.open("a") as stream:
        stream.write('{"prompt": "one more"}\n')
    with pytest.raises(UserError) as caught:
        run(path, *moved, resume=True)
    assert [problem.key for problem in caught.value.problems] == ["data.train", "reward.functions"]
    shutil.copy(file, scorer)
    shutil.copy(recipe["data"]["train"], prompts)
    same_run(run(path, *moved, resume=True), whole)


# --- held-out figures ---


@pytest.mark.parametrize("stage", TRAINERS)
def test_held_out_figures_do_not_depend_on_the_batch(write: Write, stage: str) -> None:
    """One definition: the mean over all trained tokens, or over all pairs or answers."""
    seen = []
    for size in (2, 20):
        settings = {"max_steps": 2, "per_device_eval_batch_size": size, "save_steps": 2}
        found = run(write(stage, f"by{size}", data={"eval_split": 10, "max_length": 48}, train=settings))
        seen.append(result(found)["eval"])
    assert seen[0]["loss"] > 0
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], abs=2e-5)


def test_held_out_loss_is_the_mean_over_tokens(write: Write, base: Path, tmp_path: Path) -> None:
    """Of a packed run, whose learning rate is so small that nothing moves, against the plain model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"max_steps": 1, "learning_rate": 1e-12, "per_device_eval_batch_size": 3}
    sections = {"eval_split": 30, "packing": True}
    found = run(write("sft", data=sections, train=settings, adapter={"lora_dropout": 0.0}))
    from finetune.data.chat import make_encoder
    from finetune.data.conversations import load_sft
    from finetune.families import family

    config = load(str(tmp_path / "run.yaml"), RECIPES["sft"]).data
    held = load_sft(config, make_encoder(AutoTokenizer.from_pretrained(base), family("llama")), seed=42).eval
    model, total, count = AutoModelForCausalLM.from_pretrained(base), 0.0, 0
    assert len({len(row["input_ids"]) for row in held}) > 2
    for row in held:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        logits = model(ids[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    seen = result(found)["eval"]
    assert seen["loss"] == pytest.approx(total / count, abs=1e-5)
    low, high = seen["loss_ci"]  # of ten batches
    assert low < seen["loss"] < high < low + 0.5


@pytest.mark.parametrize("stage", TRAINERS)
def test_the_result_has_the_figures_of_the_saved_weights(
    write: Write, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    evaluate = Extras.evaluation_loop

    def best_at_two(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = 1.0 + abs(self.state.global_step - 2)
        return output

    monkeypatch.setattr(Extras, "evaluation_loop", best_at_two)
    settings = {
        "max_steps": 4, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1,
    }  # fmt: skip
    found = run(write(stage, data={"eval_split": 8}, train=settings))
    assert logged(found, "eval_loss") == [2.0, 1.0, 2.0, 3.0]
    second = next(row for row in found.read_metrics() if row["step"] == 2 and "eval_loss" in row)
    assert result(found)["eval"] == {k[5:]: v for k, v in second.items() if k.startswith("eval_")}
    assert result(found)["best_checkpoint"].endswith("checkpoint-2")
    assert {p.name for p in found.checkpoints.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    kept = tensors(found.checkpoints / "checkpoint-2")
    assert all(torch.equal(tensor, kept[key]) for key, tensor in tensors(found.adapter).items())


def test_weights_that_were_not_evaluated_are(write: Write) -> None:
    """A kill between the last checkpoint and the evaluation that belongs to it."""
    whole = run(write("sft", "whole", data={"eval_split": 8}, train={"eval_steps": 3}))
    broken = stopped_after(whole, "broken", 7)
    rows = [row for row in broken.read_metrics() if "eval_loss" not in row or row["step"] != 7]
    broken.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = run(write("sft", "broken", data={"eval_split": 8}, train={"eval_steps": 3}), resume=True)
    assert result(again)["eval"] == result(whole)["eval"]


# --- numbers that are none ---

BROKEN = {
    "max_steps": 12, "optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0, "logging_steps": 100,
    "save_steps": 1, "save_total_limit": 1, "lr_scheduler_type": "constant",
}  # fmt: skip


@pytest.mark.parametrize("stage", [*TRAINERS, "ppo"])
def test_numbers_that_are_none_stop_the_run(write: Write, tmp_path: Path, base: Path, stage: str) -> None:
    """Also between logged steps, before a checkpoint of them, with the reason on record."""
    settings = {**BROKEN, "save_steps": 2}
    if stage == "ppo":
        path = ppo_recipe(tmp_path, base, "run", train=settings, ppo={"max_update_kl": 1e30})
    else:
        path = write(stage, train=settings)
    with pytest.raises(RunError, match=r"(became (nan|inf)|not finite) "):
        run(path)
    found = Run(tmp_path / "run")
    assert not found.result.exists()
    for folder in found.complete_checkpoints():
        assert all(t.isfinite().all() for t in tensors(folder).values())
    for line in found.metrics.read_text().split("\n")[:-1] if found.metrics.exists() else []:
        json.loads(line, parse_constant=pytest.fail)


def test_a_held_out_loss_that_is_none_stops_the_run(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Extras.evaluation_loop

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = math.nan
        return output

    monkeypatch.setattr(Extras, "evaluation_loop", broken)
    path = write("sft", data={"eval_split": 8}, train={"max_steps": 3, "eval_steps": 2})
    with pytest.raises(RunError, match="eval_loss became nan at step 2: lower train"):
        run(path)


@pytest.mark.parametrize("stage", [*TRAINERS, "ppo"])
def test_weights_of_the_last_step_are_looked_at(
    write: Write, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Loss and gradients were numbers still."""
    step = torch.optim.SGD.step

    def overflowing(self: Any, closure: Any = None) -> Any:
        found = step(self)
        self.param_groups[0]["params"][0].data[:] = math.nan
        return found

    monkeypatch.setattr(torch.optim.SGD, "step", overflowing)
    settings = {**BROKEN, "max_steps": 1, "learning_rate": 1e-3}
    one = {"num_ppo_epochs": 1, "num_mini_batches": 1}
    path = (
        ppo_recipe(tmp_path, base, "run", train=settings, ppo=one) if stage == "ppo" else write(stage, train=settings)
    )
    with pytest.raises(RunError, match="weights are not finite at step 1"):
        run(path)
    assert not Run(tmp_path / "run").complete_checkpoints()
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_that_float16_cannot_hold_are_not_saved(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 while they are trained; the model is stored in the recipe's precision."""
    settings = {**BROKEN, "max_steps": 1, "learning_rate": 1e9, "save_steps": 5}
    path = write("sft", adapter={"method": "full"}, model={"dtype": "float16"}, train=settings)
    monkeypatch.setattr("finetune.training.checkpointing.check_finite", lambda *a: None)
    with pytest.raises(RunError, match=r"not finite (in float16|at the end)"):
        run(path)


class LargeScale(torch.amp.GradScaler):
    """With which the first gradients do not fit into float16."""

    def __init__(self, device: str = "cpu", enabled: bool = True) -> None:
        super().__init__(device, init_scale=2.0**34, enabled=enabled)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_steps_that_loss_scaling_leaves_out_do_not_end_a_run(
    write: Write, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", LargeScale)
    steps = 8 if stage == "ppo" else 24  # of several updates each
    settings = {"max_steps": steps, "logging_steps": 1, "save_steps": 100}
    sections: dict[str, Any] = {"model": {"dtype": "float16"}, "train": settings}
    found = run(ppo_recipe(tmp_path, base, "run", **sections) if stage == "ppo" else write(stage, **sections))
    rows = found.read_metrics()
    assert "grad_norm" not in rows[0], "it was left out"
    assert "grad_norm" in rows[-1]
    assert result(found)["status"] == "done"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_of_which_every_step_was_left_out_has_trained_nothing(
    write: Write, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", LargeScale)
    sections: dict[str, Any] = {"model": {"dtype": "float16"}, "train": {"max_steps": 1}}
    with pytest.raises(RunError, match=r"left out all \d+ steps: nothing was trained"):
        run(ppo_recipe(tmp_path, base, "run", **sections) if stage == "ppo" else write(stage, **sections))


# --- signals and rules ---


def test_a_hang_up_saves_a_checkpoint(write: Write, tmp_path: Path) -> None:
    """The terminal is closed: nothing can be written to it any more, and the run goes on with --resume.

    In a process of its own, which loses its terminal.
    """
    path = write("sft", train={"max_steps": 3000, "save_steps": 5000, "logging_steps": 1})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "finetune", "sft", "--recipe", str(path)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    os.set_blocking(ours, False)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not metrics.exists() and process.poll() is None:
        try:
            os.read(ours, 1 << 16)
        except BlockingIOError:
            time.sleep(0.05)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)  # the shell's, beside the system's
    assert process.wait(timeout=120) == 130
    found = Run(tmp_path / "run")
    assert found.last_checkpoint() is not None
    assert damage(found.complete_checkpoints()[0]) is None


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_that_stop_ppo(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from finetune.rl.ppo import Ppo

    step = Ppo.step

    def interrupted(self: Ppo, *arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Ppo, "step", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 1"):
        run_ppo(ppo_recipe(tmp_path, base))
    assert signal.getsignal(number) == signal.SIG_DFL
    assert Run(tmp_path / "ppo").last_checkpoint() is not None


def test_a_stop_inside_an_epoch_evaluates_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation and checkpoints by epoch: the stop is no end of an epoch."""
    from finetune.training.callbacks import Recorder

    settings = {"max_steps": None, "num_train_epochs": 2, "save_steps": None, "logging_steps": 1}
    whole = run(write("sft", "whole", data={"eval_split": 8}, train=settings))
    step_end = Recorder.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step_end(self, args, state, control, **kwargs)

    path = write("sft", data={"eval_split": 8}, train=settings)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", interrupted)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            run(path)
    assert not logged(Run(whole.path.with_name("run")), "eval_loss")
    same_run(run(path, resume=True), whole)


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise BaseException('no')",
        "raise SystemExit",
        "quit()",
        "return (exit(0) for _ in prompts)",
        "gone(0)",
    ],
)
def test_a_rule_cannot_end_a_run(tmp_path: Path, base: Path, body: str) -> None:
    head = "from os import _exit as gone\n\n\n"
    file = rule(tmp_path, f"{head}def f(prompts, completions, **_):\n    {body}\n")
    with pytest.raises(RunError, match=r"rule\.py:f failed: "):
        run_ppo(ppo_recipe(tmp_path, base, reward={"functions": [f"{file}:f"]}))
    assert not (tmp_path / "ppo" / "result.json").exists()


@pytest.mark.parametrize("head", ["raise SystemExit(0)", "import os; os._exit(0)"])
def test_a_rule_cannot_end_a_run_as_it_is_imported(tmp_path: Path, base: Path, head: str) -> None:
    file = rule(tmp_path, f"{head}\n\n\ndef f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(UserError, match="cannot be imported"):
        run_ppo(ppo_recipe(tmp_path, base, reward={"functions": [f"{file}:f"]}))


def test_a_rule_may_fork(tmp_path: Path, base: Path) -> None:
    """A child ends by os._exit, and must not come back as a second run."""
    text = (
        "import os\n\n\ndef f(prompts, completions, **_):\n    child = os.fork()\n    if not child:\n"
        "        os._exit(3)\n    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "    return [float(code)] * len(prompts)\n"
    )
    found = run_ppo(
        ppo_recipe(tmp_path, base, train={"max_steps": 1}, reward={"functions": [f"{rule(tmp_path, text)}:f"]})
    )
    assert logged(found, "reward_mean") == [3.0]


# --- lines that a kill has cut ---


def test_half_a_last_line_and_a_line_separator_in_a_prompt(
    finished: dict[str, tuple[Path, Run]], tmp_path: Path
) -> None:
    for stage in ("sft", "ppo"):
        path, whole = finished[stage]
        copy = stopped_after(whole, f"half-{stage}-{tmp_path.name}", 2)
        with copy.metrics.open("ab") as stream:
            stream.write('{"step": 3, "loss": 1.0, "text": "é'.encode()[:-1])
        if stage == "ppo":
            with copy.samples.open("a", encoding="utf-8") as stream:
                stream.write(
                    '{"step": 2, "prompt": "one\u2028two\x85three", "reply": "", "score": 0}\n{"step": 3, "pro'
                )
        again = run(path, f"output.dir={copy.path}", resume=True)
        assert comparable(again) == comparable(whole)
        if stage == "ppo":
            assert "one\u2028two\x85three" in again.samples.read_text("utf-8")


def test_marks_hold_what_is_read(finished: dict[str, tuple[Path, Run]]) -> None:
    for stage, keys in (
        ("sft", {"model.name", "model.chat_template", "data.train"}),
        ("ppo", {"model.name", "model.chat_template", "data.train", "reward.functions"}),
    ):
        last = finished[stage][1].last_checkpoint()
        assert last is not None
        assert known_of(last)["inputs"].keys() == keys
