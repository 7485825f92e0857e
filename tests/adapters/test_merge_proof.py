"""The gates of a merge: what a layer's sum may miss is float32's rounding, and a hundred times that is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_methods import make

from finetune.adapters import load, merge
from finetune.errors import RunError
from finetune.recipe.adapters import LoraAdapter


def proof(dtype: torch.dtype, change: float, of_the_effect: bool, monkeypatch: pytest.MonkeyPatch) -> merge.Sums:
    """`prove_sums` of a LoRA on a base of this dtype, with every sum off by a share of the update or of the weight."""
    model = load.apply(make("llama").to(dtype), LoraAdapter(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and of_the_effect:
            parameter.data.normal_(std=0.1)  # otherwise zero: the adapter does nothing
    summed = merge.summed

    def off(layer: Any) -> torch.nn.Module:
        plain: Any = summed(layer)
        own = layer.get_base_layer().weight.data.float()
        plain.weight.data += change * (plain.weight.data - own if of_the_effect else own)
        return plain

    monkeypatch.setattr(merge, "summed", off)
    return merge.prove_sums(model, merge.inputs_of(model, list(range(3, 40))), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "of_the_effect", "refused"),
    [(5e-2, True, True), (5e-3, True, True), (3e-4, True, False), (3e-5, False, True), (2e-7, False, False)],
)
def test_what_a_sum_may_miss(
    dtype: torch.dtype, change: float, of_the_effect: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        with pytest.raises(RunError, match=r"differs from base \+ adapter"):
            proof(dtype, change, of_the_effect, monkeypatch)
    else:
        assert proof(dtype, change, of_the_effect, monkeypatch).layers == 14
