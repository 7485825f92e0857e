"""Quantized bases through the commands: train with evaluation in between, resume, evaluate, merge both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tensors, train

from finetune.commands import merge
from finetune.errors import UserError

Recipe = Callable[..., Path]
GLM = Path(__file__).parent.parent / "fixtures" / "chatglm" / "chatglm3" / "checkpoint"


@pytest.fixture(params=["llama", "chatglm3"])
def quantized(request: pytest.FixtureRequest, recipe: Recipe, base: Path) -> Recipe:
    def write(**sections: Any) -> Path:
        name = str(base) if request.param == "llama" else str(GLM)
        model = {"name": name, "sanity_check": False, **sections.pop("model", {})}
        return recipe(model=model, **sections)

    return write


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_trains_evaluates_and_resumes(quantized: Recipe, kind: str, tmp_path: Path) -> None:
    settings = {"max_steps": 12, "eval_steps": 3, "save_steps": 3, "save_total_limit": 9, "learning_rate": 1e-2}
    path = quantized(model={"quantization": kind}, train=settings, data={"eval_split": 8})
    run = train(path)
    rows = run.read_metrics()
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0]
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    assert all(t.dtype == torch.float32 for t in tensors(run.adapter).values())
    identity = json.loads((run.adapter / "base_identity.json").read_text())
    assert identity["quantization"] == kind
    whole, losses = tensors(run.adapter), [row["loss"] for row in rows if "loss" in row]
    run.result.unlink()
    for step in (9, 12):
        (run.checkpoints / f"checkpoint-{step}" / "complete").unlink()
    resumed = train(path, resume=True)
    assert [row["loss"] for row in resumed.read_metrics() if "loss" in row] == losses
    assert all(torch.equal(t, whole[k]) for k, t in tensors(resumed.adapter).items())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("choice", ["original", "dequantized"])
def test_merges_both_ways(quantized: Recipe, kind: str, choice: str, tmp_path: Path) -> None:
    run = train(quantized(model={"quantization": kind}, train={"max_steps": 12}))
    reports = {}
    for dtype in ("float32", "bfloat16"):
        merge.run(str(run.path), str(tmp_path / dtype), dtype=dtype, base=choice)
        reports[dtype] = json.loads((tmp_path / dtype / "merge.json").read_text())
        assert reports[dtype]["sum"]["largest_miss"] < 1e-3
        assert reports[dtype]["base_weights"] == choice
    gap = reports["float32"]["diff_to_trained_model"]
    if choice == "dequantized" and kind == "int4":
        assert gap < 1e-3, "the dequantized weights are what it was trained on"
    else:
        assert gap > 0
    assert all(t.dtype == torch.bfloat16 for t in tensors(tmp_path / "bfloat16").values())


def test_dequantized_needs_a_quantized_run(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    with pytest.raises(UserError, match="it was trained on the original weights"):
        merge.run(str(run.path), str(tmp_path / "m"), base="dequantized")
