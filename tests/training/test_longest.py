"""The longest rows go through before the first step, and the run is what it would be without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ft, tensors, write_rows

from finetune.rl.ppo import Ppo
from finetune.run.directory import Run
from finetune.training import longest
from finetune.training.longest import LongestFirst


def ended(run: Run) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any]]:
    timed = ("tokens_per_second", "peak_memory_gb")
    rows = [{key: value for key, value in row.items() if key not in timed} for row in run.read_metrics()]
    result = json.loads(run.result.read_text())
    return rows, tensors(run.adapter), {key: result[key] for key in ("train_loss", "trained_tokens", "steps")}


def assert_alike(stage: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    tell = longest.tell
    for module in ("finetune.training.longest", "finetune.rl.ppo"):
        monkeypatch.setattr(
            f"{module}.tell", lambda rows, length, *more: (told.append((rows, length)), tell(rows, length, *more))
        )
    done = ft(stage, path, "--output", tmp_path / "with")
    assert done.returncode == 0, done.stderr
    assert len(told) == 1
    assert "the longest rows went through first" in done.stderr
    monkeypatch.setattr(LongestFirst, "on_train_begin", lambda *_, **__: None)
    monkeypatch.setattr(Ppo, "longest_first", lambda self: None)
    assert ft(stage, path, "--output", tmp_path / "without").returncode == 0
    assert len(told) == 1
    ours, theirs = ended(Run(tmp_path / "with")), ended(Run(tmp_path / "without"))
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(ours[1][name], theirs[1][name]) for name in ours[1])


def test_a_run_is_the_same_to_the_bit(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws would be others."""
    path = recipe(adapter={"method": "lora", "r": 2, "lora_dropout": 0.3}, train={"max_steps": 2})
    assert_alike("sft", path, tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_run_of_ppo_is_the_same_to_the_bit(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rule.py").write_text("def f(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    values = {
        "version": 1, "stage": "ppo", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "p.jsonl", [{"prompt": f"say {i}" * i} for i in range(1, 9)])),
                 "max_length": 64},
        "train": {"effective_batch_size": 4, "max_steps": 2, "logging_steps": 1},
        "ppo": {"max_new_tokens": 4, "num_mini_batches": 2}, "reward": {"functions": [f"{tmp_path / 'rule.py'}:f"]},
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values))
    assert_alike("ppo", path, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_where_they_do_not_go_first_that_is_said(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = SimpleNamespace(**{"fsdp": "", "deepspeed": None, kind: "as asked for"})
    trainer = SimpleNamespace(train_dataset=[1, 2, 3], args=SimpleNamespace(train_batch_size=2))
    LongestFirst(trainer).on_train_begin(arguments, None, None)
    assert f"the longest rows do not go through first under {kind}: memory may still" in capsys.readouterr().err
