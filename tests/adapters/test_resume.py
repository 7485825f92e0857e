"""A checkpoint holds what peft's own file leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_methods import make

from finetune.adapters import load
from finetune.adapters.resume import STATE_FILE, load_state, save_state
from finetune.recipe.adapters import AdaLoraAdapter, LoraAdapter, PrefixTuningAdapter, PTuningAdapter


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "section", [PTuningAdapter(num_virtual_tokens=2), PrefixTuningAdapter(num_virtual_tokens=2), AdaLoraAdapter()],
    ids=lambda section: section.method,
)  # fmt: skip
def test_every_trained_tensor_is_back_to_the_bit(section: Any, tmp_path: Path) -> None:
    model = load.apply(make("llama"), section)
    before = trained(model)
    save_state(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert load_state(model, tmp_path)
    after = trained(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_peft_saves_whole_needs_no_file(tmp_path: Path) -> None:
    model = load.apply(make("llama"), LoraAdapter())
    save_state(model, tmp_path)
    assert not (tmp_path / STATE_FILE).exists()
    assert not load_state(model, tmp_path)
