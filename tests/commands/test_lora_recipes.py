"""The recipes of the three families, each on the built-in base of its family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ft_process, train

from finetune.models import attach, loading, sources
from finetune.models.identity import configs_of
from finetune.resources import resource_path

BASES = {"lora_llama": "tiny-llama", "lora_qwen": "tiny-qwen", "lora_chatglm3": "tiny-chatglm3"}
NETWORKS = {"tiny-llama": "LlamaForCausalLM", "tiny-qwen": "Qwen2ForCausalLM", "tiny-chatglm3": "GlmForCausalLM"}
FAMILY_RECIPES = [
    pytest.param(
        recipe, base,
        marks=pytest.mark.skipif(base not in sources.builtin_names(), reason=f"needs the built-in base {base}"),
    )
    for recipe, base in BASES.items()
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "base"), FAMILY_RECIPES)
def test_two_steps_on_the_tiny_base(recipe: str, base: str, tmp_path: Path) -> None:
    overrides = (f"model.name={base}", f"output.dir={tmp_path / 'run'}", "train.max_steps=2", "train.logging_steps=1",
                 "data.max_samples=64")  # fmt: skip
    run = train(resource_path("recipes", f"{recipe}.yaml"), *overrides)
    result = json.loads(run.result.read_text())
    assert result["steps"] == 2
    losses = [row["loss"] for row in run.read_metrics() if "loss" in row]
    assert all(0 < loss < 6 for loss in losses)  # guessing has 6.9
    config, _ = configs_of(run.adapter)
    assert config.name == base
    model = attach.attach_adapter(loading.load_model(config, torch.float32), run.adapter, config)
    assert type(model.get_base_model()).__name__ == NETWORKS[base]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "base"), FAMILY_RECIPES)
def test_each_family_learns_its_task(recipe: str, base: str, tmp_path: Path) -> None:
    """Held-out exact match at least 85%, by the commands a user types."""
    done = ft_process(
        "sft", "--recipe", recipe, "--set", f"model.name={base}", "--output", tmp_path / "run", timeout=3600
    )
    assert done.returncode == 0, done.stderr
    done = ft_process("eval", tmp_path / "run", "--limit", "150", "--json", tmp_path / "eval.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "eval.json").read_text())["runs"][0]["metrics"]
    assert metrics["exact_match"] >= 0.85
