"""AdaLoRA's penalty: zero for orthogonal vectors, positive otherwise, and added to the loss that is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train
from test_methods import make

from finetune.adapters import adalora, load
from finetune.recipe.adapters import AdaLoraAdapter, LoraAdapter


def penalty(model: Any) -> float:
    return float(torch.as_tensor(adalora.penalty(model)).detach())


def test_the_penalty_by_hand() -> None:
    """R(P, Q) = |P^T P - I| + |Q Q^T - I|, Frobenius norms, as the mean over P and Q of all layers."""
    model = load.apply(make("llama"), AdaLoraAdapter(init_r=4, target_r=2, orth_reg_weight=0.5))
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.orthogonal_(parameter)
    assert penalty(model) == pytest.approx(0, abs=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data *= 2  # Q Q^T - I = 3 I, of norm 3 * sqrt(4)
    assert penalty(model) == pytest.approx(0.5 * (6 + 0) / 2, rel=1e-5)
    assert penalty(load.apply(make("llama"), LoraAdapter())) == 0.0


def test_it_is_added_to_the_loss(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """At the start P and Q are near zero, so that each term is the norm of I: sqrt(init_r). Once per step, however many
    passes make one."""
    losses = {}
    for weight, rows in ((0.0, 8), (0.5, 8), (0.5, 4)):
        section = {"method": "adalora", "init_r": 4, "target_r": 2, "orth_reg_weight": weight}
        settings = {"max_steps": 3, "per_device_train_batch_size": rows}
        path = recipe(train=settings, output={"dir": str(tmp_path / f"{weight} {rows}")})
        run = train(path, *(f"adapter.{key}={value}" for key, value in section.items()))
        losses[weight, rows] = next(row["loss"] for row in run.read_metrics() if "loss" in row)
    assert losses[0.5, 8] - losses[0.0, 8] == pytest.approx(0.5 * 2, rel=0.05)
    assert losses[0.5, 4] == pytest.approx(losses[0.5, 8], rel=1e-3)
