"""Merging an adapter into its base's weights."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from finetune.adapters.bitfit import fill_bias_slots


def merge_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The base with the adapter added into it.

    Layer by layer the sum is formed in float32 and rounded once to the weights' own dtype; peft adds in the weights'
    dtype, which rounds the update and the sum. Memory stays at one copy of the model.
    """
    dtype = model.get_base_model().dtype
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            own = {name: p.dtype for name, p in module.get_base_layer().named_parameters()}
            for parameter in module.get_base_layer().parameters():
                parameter.data = parameter.data.float()
            module.merge(safe_merge=True)
            for name, parameter in module.get_base_layer().named_parameters():  # LN tuning swaps the layer itself
                parameter.data = parameter.data.to(own.get(name, dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")  # so they are: this takes wrappers off
        # A trained head of a model with tied embeddings has become a matrix of its own; peft sets the flag.
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
        merged = model.merge_and_unload()
    merged.to(dtype)  # whole trained modules are float32
    fill_bias_slots(merged)
    return merged


@torch.inference_mode()
def logits_of(model: torch.nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    """Logits in float32, one [length, vocabulary] tensor per sample."""
    model.eval()
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in samples]


def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """(max |a - b|, the same relative to max |a|)."""
    difference = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    return difference, difference / max(x.abs().max().item() for x in a)
