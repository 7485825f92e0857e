"""Stage x method x packing: a run that stops inside an epoch and goes on is the uninterrupted one, to the bit.

Losses of every step, the order of the samples, and the final weights; whether one thread or several, on one machine.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import VARIANTS
from conftest import tensors, write_rows
from transformers import Trainer

from finetune.errors import UserError
from finetune.recipe.file import load
from finetune.recipe.stages import RECIPES
from finetune.rl.rollout import Collector
from finetune.run.checkpoints import discard
from finetune.run.directory import Run
from finetune.training.longest import LongestFirst

STAGES = ("sft", "sft packed", "pretrain", "dpo", "kto", "reward", "ppo")
FEW = [
    ("sft packed", "adalora"), ("dpo", "adalora"), ("kto", "p_tuning MLP"), ("reward", "bitfit"), ("ppo", "bitfit"),
    ("pretrain", "full"), ("ppo", "ia3"),
]  # fmt: skip
"""What the other tests have no cell of."""


def recipe_of(stage: str, variant: str, folder: Path, base: Path, name: str) -> Path:
    """Six steps over 20 rows of different lengths, four to a step: the checkpoint of step 3 lies inside the first
    epoch."""
    section, rate = VARIANTS[variant]
    stage, _, packed = stage.partition(" ")
    steps: dict[str, Any] = {
        "max_steps": 6, "effective_batch_size": 4, "learning_rate": rate, "logging_steps": 1, "save_steps": 3,
        "save_total_limit": 9,
    }  # fmt: skip
    if stage == "ppo":
        steps |= {"max_steps": 4, "save_steps": 2, "effective_batch_size": 8, "learning_rate": rate / 10}
        (folder / "rule.py").write_text("def f(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
        more = {
            "ppo": {"max_new_tokens": 4, "num_mini_batches": 2},
            "reward": {"functions": [f"{folder / 'rule.py'}:f"]},
        }
        return written(
            folder, base, name, stage, section, steps, [{"prompt": f"say {i * 7}"} for i in range(20)], **more
        )
    rows: list[dict[str, Any]] = []
    for i in range(20):
        asked, good, bad = f"say {i}", f"{i} yes " * (1 + i % 3), f"{i} no"
        rows.append(
            {
                "sft": {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": good}]},
                "pretrain": {"text": f"{asked} {good} {bad} {good}" * 3},
                "kto": {"prompt": asked, "completion": good if i % 3 else bad, "label": bool(i % 3)},
            }.get(stage, {"prompt": asked, "chosen": good, "rejected": bad})
        )
    return written(folder, base, name, stage, section, steps, rows, **({"data": {"packing": True}} if packed else {}))


def written(
    folder: Path, base: Path, name: str, stage: str, section: dict[str, Any], steps: dict[str, Any],
    rows: list[dict[str, Any]], data: Any = None, **more: Any,
) -> Path:  # fmt: skip
    file = write_rows(folder / f"{stage}.jsonl", rows)
    quantized = {"quantization": "int4"} if section.get("init_lora_weights") == "loftq" else {}
    values = {
        "version": 1, "stage": stage, "model": {"name": str(base), "dtype": "float32", **quantized}, "adapter": section,
        "data": {"train": str(file), "max_length": 64, **(data or {})}, "train": steps,
        "output": {"dir": str(folder / name)}, **more,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def trained(path: Path, resume: bool = False) -> Run:
    stage = load(str(path), None).stage
    recipe: Any = load(str(path), RECIPES[stage])
    importlib.import_module(f"finetune.commands.{stage}").run(recipe, resume=resume)
    return Run(Path(recipe.output.dir))


def comparable(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    timed = ("tokens_per_second", "peak_memory_gb")
    return [{key: value for key, value in row.items() if key not in timed} for row in run.read_metrics()]


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every step trains on from here on, in order."""
    seen: list[Any] = []
    step, collect = Trainer.training_step, Collector.collect

    def batch(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        seen.append({k: v.tolist() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return step(self, model, inputs, *more, **named)

    def prompts(self: Any, given: Any, *more: Any) -> Any:
        found = collect(self, given, *more)
        seen.append(([prompt.ids for prompt in given], found.texts))
        return found

    monkeypatch.setattr(LongestFirst, "on_train_begin", lambda *_, **__: None)  # no pass beside the steps
    monkeypatch.setattr(Trainer, "training_step", batch)
    monkeypatch.setattr(Collector, "collect", prompts)
    return seen


def differences(stage: str, variant: str, folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In what the run that goes on is another; `refused: …` where the recipe is none."""
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: folder / "cache")
    with monkeypatch.context() as patch:
        seen = seen_by(patch)
        try:
            whole = trained(recipe_of(stage, variant, folder, base, "whole"))
        except UserError as error:
            return [f"refused: {error}"]
        every, half = list(seen), len(seen) // 2
        seen.clear()
        broken = Run(shutil.copytree(whole.path, folder / "broken"))
        broken.result.unlink()
        discard(broken.complete_checkpoints()[0])
        again = trained(recipe_of(stage, variant, folder, base, "broken"), resume=True)
    found = []
    if seen != every[half:]:
        found.append(f"{len(seen)} passes, and other samples than the last {half} of the whole run")
    if comparable(whole) != comparable(again):
        found.append("other rows in metrics.jsonl")
    ours, theirs = (tensors(run.adapter if run.adapter.is_dir() else run.model) for run in (whole, again))
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if unequal or ours.keys() != theirs.keys():
        found.append(f"other weights: {unequal[:3]}")
    return found


@pytest.mark.parametrize(("stage", "variant"), FEW)
def test_goes_on_to_the_bit(
    stage: str, variant: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differences(stage, variant, tmp_path, base, monkeypatch) == []


REFUSED: dict[str, set[str]] = {"ppo": {"adalora", "full"}}
"""Methods that a stage refuses by name."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_method_goes_on_to_the_bit(
    stage: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last result stands in docs/reliability.md."""
    found, equal, refused = {}, 0, {}
    for number, variant in enumerate(VARIANTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong = differences(stage, variant, folder, base, monkeypatch)
        if not wrong:
            equal += 1
        elif wrong[0].startswith("refused"):
            refused[variant] = wrong[0]
        else:
            found[variant] = wrong
    print(f"{stage}: {equal} of {len(VARIANTS)} equal to the bit, refused: {refused}")
    assert found == {}
    assert refused.keys() == REFUSED.get(stage, set()), refused
