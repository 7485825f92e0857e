"""A LoRA adapter with one rank and one scale on every layer, computing what it did.

vLLM before 0.33 takes `r` and `lora_alpha` for every layer, whatever rank_pattern and alpha_pattern say.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from finetune.models.adapter_files import scale_of

Weights = dict[str, torch.Tensor]


def uniform(stored: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """(adapter_config.json, weights) without patterns.

    A gets rows of zeros and B columns of them up to the largest rank; where a layer's scale is another than that of
    most, B has the difference, in float32.
    """
    ranks = {layer: rank_of(layer, weights) for layer in layers_of(weights)}
    scales = {layer: scale_of(stored, layer) for layer in ranks}
    rank = max(ranks.values())
    scale = Counter(scales.values()).most_common(1)[0][0]
    out: Weights = {}
    for name, tensor in weights.items():
        layer, is_a = layer_of(name)
        if not is_a and scales[layer] != scale:
            tensor = tensor.float() * (scales[layer] / scale)
        missing = rank - ranks[layer]
        out[name] = torch.nn.functional.pad(tensor, (0, 0, 0, missing) if is_a else (0, missing))
    patterns = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return {**stored, **patterns, "r": rank, "lora_alpha": scale * rank}, out


def layer_of(name: str) -> tuple[str, bool]:
    """(layer as adapter_config.json names it, whether the weight is its A)."""
    layer, _, rest = name.partition(".lora_")
    return layer.removeprefix("base_model.model."), rest.removeprefix("embedding_").startswith("A")


def layers_of(weights: Weights) -> list[str]:
    return sorted({layer_of(name)[0] for name in weights})


def rank_of(layer: str, weights: Weights) -> int:
    return next(len(tensor) for name, tensor in weights.items() if layer_of(name) == (layer, True))


def deltas(stored: dict[str, Any], weights: Weights) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (scale · B, A), in float64."""
    found = {}
    for layer in layers_of(weights):
        a, b = (next(t for name, t in weights.items() if layer_of(name) == (layer, is_a)) for is_a in (True, False))
        found[layer] = (b.double() * scale_of(stored, layer), a.double())
    return found
