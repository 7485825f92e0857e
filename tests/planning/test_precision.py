"""Which precision `model.dtype: auto` is on CPUs: what was timed decides, and a run that goes on keeps what it had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train
from transformers import AutoConfig

from finetune.models import hardware
from finetune.planning import precision
from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware
from finetune.run.directory import read_recipe

CPU = Hardware("cpu", bf16=True)


def asked(**model: Any) -> Any:
    values = {"version": 1, "stage": "sft", "model": {"name": "tiny-llama", **model}, "output": {"dir": "r"},
              "data": {"train": "d", "max_length": 32}}  # fmt: skip
    return check(values, "sft")


def clock(monkeypatch: pytest.MonkeyPatch, plain: float, half: float) -> list[bool]:
    """Passes take so long in float32 and in bfloat16; returns which were taken."""
    taken: list[bool] = []

    def seconds(network: Any, states: torch.Tensor, in_half: bool) -> float:
        taken.append(in_half)
        assert next(network.parameters()).dtype == (torch.bfloat16 if in_half else torch.float32)
        return half if in_half else plain

    monkeypatch.setattr(precision, "seconds", seconds)
    monkeypatch.setattr(precision, "_known", {})
    return taken


@pytest.mark.parametrize(("plain", "half", "found"), [(1.0, 0.4, True), (1.0, 0.95, False), (1.0, 1.8, False)])
def test_the_faster_one_is_taken(plain: float, half: float, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = clock(monkeypatch, plain, half)
    machine, said = precision.timed(asked(), CPU)
    assert machine.bf16 is found
    kind = "bfloat16" if found else "float32"
    assert f"auto is {kind}" in (said or "")
    assert taken.count(True) == taken.count(False) > 1
    precision.timed(asked(), CPU)
    assert len(taken) == 2 * taken.count(True) == 2 * (precision.ROUNDS + 1), "timed once in a process"


@pytest.mark.parametrize(
    ("model", "machine"),
    [
        ({"dtype": "float32"}, CPU),
        ({"dtype": "bfloat16"}, CPU),
        ({}, Hardware("cpu", bf16=False)),
        ({}, Hardware("cuda", bf16=True)),
        ({}, Hardware("cpu", bf16=True, processes=2)),
        ({"quantization": "int8"}, CPU),
    ],
)
def test_nothing_is_timed(model: dict[str, Any], machine: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = clock(monkeypatch, 1.0, 9.0)
    assert precision.timed(asked(**model), machine) == (machine, None)
    assert not taken


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3_moe", "glm4"])
@pytest.mark.parametrize("full", [False, True])
def test_a_block_of_any_kind(kind: str, full: bool) -> None:
    """Forward and backward in both; nothing is left behind, random numbers included."""
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
             "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
             "head_dim": 8, "num_key_value_heads": 2}  # fmt: skip
    config = AutoConfig.for_model(kind, **small)
    before, text = torch.get_rng_state(), config.to_json_string()
    found = precision.block_seconds(config, 16, full)
    assert found is not None
    assert min(found) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert config.to_json_string() == text


def test_a_block_too_large_is_not_tried() -> None:
    config = AutoConfig.for_model("llama", hidden_size=16384, intermediate_size=53248, num_attention_heads=128)
    assert precision.block_seconds(config, 16, False) is None


def test_a_run_that_goes_on_keeps_what_it_had(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed anew, it would now be the other one."""
    path = recipe(model={"dtype": "auto"})
    monkeypatch.setattr(hardware, "detect", lambda: CPU)
    clock(monkeypatch, 1.0, 0.5)
    run = train(path, "train.max_steps=2", "train.save_steps=1")
    taken = clock(monkeypatch, 1.0, 5.0)
    train(path, "train.max_steps=4", "train.save_steps=1", resume=True)
    assert not taken
    assert read_recipe(run.path)["model"]["dtype"] == "bfloat16"
    result = json.loads(run.result.read_text())
    assert result["steps"] == 4
    assert "model.dtype: auto is bfloat16, as the run was begun" in result["decisions"]
