"""Merging an adapter into its base's weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.bitfit import empty_bias, fill_bias_slots
from finetune.adapters.limits import BIAS_SLOTS
from finetune.errors import UserError


def check_layers(adapted: Any, folder: Path) -> None:
    """UserError for layers whose adapter can never be added to the base's weights.

    Args:
        adapted: the adapter on a network without weights.
    """
    fix = "use it as it is: ft eval, ft chat and peft load it onto the base"
    kind = adapted.peft_config["default"].peft_type.value
    model_type = adapted.get_base_model().config.model_type
    slots = {name for group in BIAS_SLOTS.get(model_type, {}).values() for name in group}
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and type(module).merge is BaseTunerLayer.merge:
            what = f"{kind.lower()} cannot be merged: peft has no sum of it and a weight"
            raise UserError(what, path=folder, key="--adapter", fix=fix)
        if lacks_bias(module) and name.rpartition(".")[2] not in slots:
            what = f"has a bias (lora_bias) on {name}, where {model_type} checkpoints have no place for one"
            raise UserError(what, path=folder, key="--adapter", fix=fix)


def lacks_bias(module: Any) -> bool:
    """A LoRA layer with a bias of its own, on a layer that has none to add it to."""
    return any(getattr(module, "lora_bias", {}).values()) and module.get_base_layer().bias is None


def untie(network: Any) -> None:
    """A matrix of its own for a tied output head, where an adapter changes the embeddings or the head alone: merged in
    place, the sum would reach the other one, too."""
    inside, head = network.get_input_embeddings(), network.get_output_embeddings()
    adapted = [isinstance(module, BaseTunerLayer) for module in (inside, head)]
    bare = [m.get_base_layer() if a else m for m, a in zip((inside, head), adapted, strict=True)]
    if any(adapted) and bare[0].weight is bare[1].weight:
        bare[1].weight = nn.Parameter(bare[1].weight.detach().clone(), requires_grad=False)


def settle_tie(merged: Any) -> None:
    """config.json says whether head and embeddings are one; equal ones stay so."""
    inside, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    tied = merged.config.get_text_config().tie_word_embeddings
    if not tied or head is None or head.weight is inside.weight:
        return
    if torch.equal(head.weight, inside.weight):
        head.weight = inside.weight
    else:
        merged.config.tie_word_embeddings = merged.config.get_text_config().tie_word_embeddings = False


def merge_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The base with the adapter added into it.

    Layer by layer the sum is formed in float32 and rounded once to the weights' own dtype; peft adds in the weights'
    dtype, which rounds the update and the sum. Memory stays at one copy of the model.
    """
    dtype = model.get_base_model().dtype
    untie(model.get_base_model())
    for module in model.modules():
        if lacks_bias(module):
            module.get_base_layer().bias = empty_bias(module.get_base_layer())
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
        warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")  # see untie
        merged = model.merge_and_unload()
    merged.to(dtype)  # whole trained modules are float32
    fill_bias_slots(merged)
    settle_tie(merged)
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
