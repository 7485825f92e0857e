"""Out of memory: one message with figures and ways out, or by itself with fewer rows per pass and the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ft, tensors, write_rows
from transformers import Trainer

from finetune.cli import shared
from finetune.planning import fits
from finetune.recipe.file import load
from finetune.recipe.resolve import Hardware, resolve
from finetune.rl.update import Learner
from finetune.run.directory import Run
from finetune.training import memory
from finetune.training.health import ADVICE
from finetune.training.longest import LongestFirst

CUDA = "CUDA out of memory. Tried to allocate 1.00 GiB"
ERRORS: dict[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError(CUDA),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    "python": MemoryError,
}


def written(recipe: Any, tmp_path: Path, stage: str, **train: Any) -> Path:
    settings = {
        "max_steps": 6, "effective_batch_size": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
        "save_steps": 2, **train,
    }  # fmt: skip
    if stage == "sft packed":
        packed = {"gradient_accumulation_steps": None, "effective_batch_size": 16, "per_device_train_batch_size": 2}
        path: Path = recipe(train={**settings, **packed}, data={"packing": True})
        return path
    path = recipe(train=settings)
    if stage == "dpo":
        pairs = [{"prompt": f"say {i}", "chosen": f"{i} yes", "rejected": "no"} for i in range(40)]
        values = yaml.safe_load(path.read_text()) | {"stage": "dpo"}
        values["data"]["train"] = str(write_rows(tmp_path / "pairs.jsonl", pairs))
        path.write_text(yaml.safe_dump(values))
    return path


def too_many(
    monkeypatch: pytest.MonkeyPatch, most: int, error: Callable[[], BaseException], after: int = 0
) -> list[int]:
    """From step `after` on a pass with more than `most` rows runs out of memory. The rows of every pass."""
    step, seen = Trainer.training_step, list[int]()

    def limited(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        rows = self.args.per_device_train_batch_size
        if rows > most and self.state.global_step >= after:
            raise error()
        seen.append(rows)
        return step(self, model, inputs, *more, **named)

    monkeypatch.setattr(LongestFirst, "on_train_begin", lambda *_, **__: None)  # steps are counted here
    monkeypatch.setattr(Trainer, "training_step", limited)
    return seen


@pytest.mark.whole
@pytest.mark.parametrize("kind", ERRORS)
def test_one_message_with_figures_and_three_ways_out(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    too_many(monkeypatch, 0, ERRORS[kind])
    if kind != "gpu":  # once is enough: it takes seconds
        rows = {fits.ROWS: 4, "train.gradient_accumulation_steps": 2}
        any_recipe = load(str(recipe()), None)
        made = [fits.Change(rows, 1.0, "more passes of fewer rows: the same gradient", 10**9, any_recipe),
                *(fits.Change({f"a.key{i}": i}, 1 + i / 10, "why", 10**9, any_recipe) for i in (1, 2))]  # fmt: skip
        monkeypatch.setattr(fits, "changes", lambda *_: made)
    done = ft("sft", written(recipe, tmp_path, "sft"))
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("out of memory (")
    for part in (
        "by ft plan ", "GB for the weights and ", "with passes of 8 rows of up to ",
        "GB were in use at most. Ways out: ",
        "train.per_device_train_batch_size: 4 and train.gradient_accumulation_steps: 2, or "
        "train.auto_find_batch_size: true, which finds it by itself (more passes of fewer rows: the same gradient; ",
        " GB, the same time); ", " x the time)" if kind != "gpu" else "",
    ):  # fmt: skip
        assert part in last
    assert "bug" not in done.stderr
    assert ADVICE not in done.stderr


def test_other_errors_stay_what_they_are(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_many(monkeypatch, 0, lambda: RuntimeError("shapes do not match"))
    done = ft("sft", written(recipe, tmp_path, "sft", auto_find_batch_size=True))
    assert "out of memory" not in done.stderr
    assert "shapes do not match" in done.stderr


@pytest.mark.whole
def test_ways_out_are_the_three_cheapest_of_ft_plan(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Hardware("cuda", True, 24.0)
    made = resolve(load(str(recipe()), None), machine)
    found = memory.planned(made, machine, 8, 60)
    assert found is not None
    held = found.parts["weights"] + found.parts["framework"]
    assert memory.enough(found, machine) == held + 0.9 * (found.peak - held), "it was said to fit"
    assert memory.enough(found, Hardware("cuda", True, 0.5)) == 0.95 * 0.5e9
    clear = [fits.Change({f"a.key{i}": i > 0}, 1 + i / 10, f"why {i}", 10**9 + i, made) for i in range(4)]
    slight = [fits.Change({"b.c": 3}, 1.0, "slightly", 10**9, made), fits.Change({"d.e": 3}, 2.0, "more", 10**8, made)]

    def told(clearly: list[fits.Change]) -> list[str]:
        def changes(_: Any, __: Any, now: Any, ___: Any, limit: float) -> list[fits.Change]:
            return [*clearly, *slight] if limit == now.peak - 1 else list(clearly)

        monkeypatch.setattr(fits, "changes", changes)
        return memory.ways_out(made, machine, 8, found)

    three = ["a.key0: false (why 0; 1 GB, the same time)", "a.key1: true (why 1; 1 GB, 1.10 x the time)"]
    assert told(clear) == [*three, "a.key2: true (why 2; 1 GB, 1.20 x the time)"]
    assert told(clear[:2]) == [*three, "d.e: 3 (more; 0.1 GB, 2.00 x the time)"]
    slight.clear()
    assert told([]) == [memory.NOTHING]


def test_ways_out_are_none_that_the_stage_or_the_method_refuses(recipe: Any, tmp_path: Path) -> None:
    """Without a plan, all that there are; what a recipe may not say is not told."""

    def ways(path: Path, rows: int = 1) -> str:
        return " | ".join(memory.ways_out(resolve(load(str(path), None), Hardware()), Hardware(), rows, None))

    assert "auto_find_batch_size" in ways(recipe(train={"effective_batch_size": 8}), 4)
    assert "auto_find" not in ways(recipe(train={"effective_batch_size": 8, "auto_find_batch_size": True}), 4)
    settings = {"gradient_checkpointing": True, "optim": "sgd", "per_device_train_batch_size": 1}
    loha = recipe(train=settings, data={"max_length": 1024})
    values = yaml.safe_load(loha.read_text()) | {"adapter": {"method": "loha"}}
    loha.write_text(yaml.safe_dump(values))
    assert ways(loha) == "data.max_length: 512 (longer rows are cut)", "LoHa takes no quantized base"
    packed = recipe(data={"packing": True}, train={"gradient_accumulation_steps": 2})
    assert fits.ROWS not in ways(packed, 4), "with the passes of packed rows given, their number cannot be"


def test_replies_may_be_shorter_in_ppo_and_rows_fewer_by_themselves(ppo_recipe: Path) -> None:
    made = resolve(load(str(ppo_recipe), None), Hardware())
    keys = [key for settings, *_ in fits.candidates(made, fits.length_of(made)) for key in settings]
    assert {"ppo.max_new_tokens", fits.ROWS, "eval.batch_size"} <= {*keys}
    assert all(fits.is_allowed(made, settings) for settings, *_ in fits.candidates(made, fits.length_of(made)))


@pytest.fixture
def ppo_recipe(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "rule.py").write_text("def f(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    values = {
        "version": 1, "stage": "ppo", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(16)])),
                 "max_length": 512},
        "train": {"effective_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
                  "max_steps": 3, "save_steps": 1, "auto_find_batch_size": True},
        "ppo": {"max_new_tokens": 64, "num_mini_batches": 2}, "reward": {"functions": [f"{tmp_path / 'rule.py'}:f"]},
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_ppo_goes_on_with_fewer_rows(ppo_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, begun = Learner.minibatch, list[list[str]]()

    def limited(self: Any, *given: Any, **named: Any) -> Any:
        if self.rows > 2 and self.scheduler.last_epoch >= 1:  # after a rollout
            raise torch.OutOfMemoryError(CUDA)
        return learn(self, *given, **named)

    def here(words: list[str]) -> None:
        begun.append(words)
        sys.exit(ft(*words).returncode)

    monkeypatch.setattr(Learner, "minibatch", limited)
    monkeypatch.setattr(shared, "replace_process", here)
    done = ft("ppo", ppo_recipe, "--set", "ppo.max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    assert ["--resume" in words for words in begun] == [True]
    assert Run(tmp_path / "run").done()


@pytest.mark.whole
def test_figures_grow_with_rows_and_are_left_out_where_nothing_is_known(recipe: Any, tmp_path: Path) -> None:
    one, machine = resolve(load(str(recipe()), None), Hardware()), Hardware("cuda", True, 24.0)
    found = [memory.planned(one, machine, rows, 1000) for rows in (4, 40)]
    said = [memory.figures(estimate, machine) for estimate in found if estimate is not None]
    passes = [float(text.split(" and ")[1].split()[0]) for text in said]
    assert passes[1] > 1.5 * passes[0]
    assert "of 24 GB" in said[0]
    nowhere = load(str(recipe(model={"name": str(tmp_path / "nowhere")})), None)
    assert memory.planned(nowhere, Hardware(), 1, 1) is None


@pytest.mark.parametrize(
    ("stage", "most", "after", "passes"),
    [("sft", 2, 0, [2] * 24), ("sft", 4, 3, [8] * 3 + [4] * 8), ("dpo", 4, 3, [8] * 3 + [4] * 8),
     ("sft packed", 1, 3, None)],
)  # fmt: skip
def test_goes_on_with_fewer_rows_and_the_same_steps(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, most: int, after: int, passes: Any
) -> None:
    """From the last checkpoint, that of step 2: the same samples in every step, so the losses are the same, too."""
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")
    path = written(recipe, tmp_path, stage, auto_find_batch_size=True)
    whole = ft(stage.split()[0], path, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    seen = too_many(monkeypatch, most, ERRORS["gpu"], after)
    begun: list[list[str]] = []

    def here(words: list[str]) -> None:
        begun.append(words)
        done = ft(*words)
        print(done.stderr, file=sys.stderr)
        sys.exit(done.returncode)

    monkeypatch.setattr(shared, "replace_process", here)
    done = ft(stage.split()[0], path)
    assert done.returncode == 0, done.stderr
    assert (
        "out of memory (CUDA out of memory. Tried to allocate 1.00 GiB): going on with train.per_device" in done.stderr
    )
    assert all(("--resume" in words) == (after > 0) and ("--overwrite" in words) == (after == 0) for words in begun)
    if passes is not None:
        assert seen == passes
    losses = [
        [row["loss"] for row in Run(tmp_path / name).read_metrics() if "loss" in row] for name in ("whole", "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    ours, theirs = tensors(tmp_path / "whole" / "adapter"), tensors(tmp_path / "run" / "adapter")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert any("not equal to the last bit" in line for line in result["decisions"]) == (after > 0)


def test_one_row_cannot_be_halved(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "replace_process", lambda words: pytest.fail(str(words)))
    too_many(monkeypatch, 0, ERRORS["gpu"])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "auto_find_batch_size": True}
    done = ft("sft", written(recipe, tmp_path, "sft", **settings))
    assert done.returncode == 1
    assert "out of memory" in done.stderr.strip().splitlines()[-1]


HOOK = """
import sys, importlib.abc, importlib.util

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "finetune.training.trainers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            import torch
            from transformers import Trainer
            step = Trainer.training_step

            def limited(self, model, inputs, *more, **named):
                if len(inputs["input_ids"]) > 2 and self.state.global_step >= 3:
                    raise torch.OutOfMemoryError("CUDA out of memory. Injected")
                return step(self, model, inputs, *more, **named)

            Trainer.training_step = limited

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_a_real_process_takes_the_place_of_the_other(recipe: Any, tmp_path: Path) -> None:
    """8 rows, then 4, then 2, in one process id."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    path = written(recipe, tmp_path, "sft", auto_find_batch_size=True)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'hook'}:{os.environ.get('PYTHONPATH', '')}", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "sft", str(path)], capture_output=True, text=True, env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("going on with train.per_device_train_batch_size") == 2
    assert Run(tmp_path / "run").done()
