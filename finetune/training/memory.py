"""How many tokens there is memory for in a training pass, from config.json alone: a cautious estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.models.config import embedding_rows
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import Recipe

# Values that a block keeps for the backward pass, per token: inputs and outputs of norms, projections, rotation and
# activation, and of the adapters on them. SmolLM2-135M with LoRA on every linear layer, measured: 2.8 to 3.2 MB a token
# in float32 with the head; by these figures 2.9.
OF_HIDDEN, OF_INNER = 12, 7
# Logits, their log-probabilities and the gradients of both are float32, and there at once.
OF_VOCABULARY = 4
SHARE = {"cpu": 0.25, "mps": 0.25}  # of main memory, in which other programs live, too
OF_A_GPU = 0.5
PAIRS = ("dpo", "kto", "reward")  # a row is two sequences
NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "inner": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff"),
}


def room(recipe: Recipe, config: Mapping[str, Any], machine: Hardware) -> int | None:
    """Tokens per pass, at least 1; None where the config does not say how large the model is."""
    sizes = _sizes(config)
    if sizes is None or not machine.memory_gb:
        return None
    hidden, layers, inner, vocabulary = sizes
    train, full = recipe.train, recipe.adapter.method == "full"
    wide = 4 if recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not machine.bf16) else 2
    block = (OF_HIDDEN * hidden + OF_INNER * inner) * wide
    recomputed = machine.device != "cpu" if train.gradient_checkpointing is None else train.gradient_checkpointing
    kept = layers * hidden * wide + block if recomputed else layers * block
    head = 0 if recipe.stage == "reward" else OF_VOCABULARY * vocabulary * 4
    free = machine.memory_gb * 1e9 * SHARE.get(machine.device, OF_A_GPU) - _weights(sizes, recipe, 16 if full else wide)
    sequences = 2 if recipe.stage in PAIRS else 1
    return max(1, int(free / (kept + head) / sequences))


def _weights(sizes: tuple[int, int, int, int], recipe: Recipe, wide: int) -> float:
    """Bytes of the base; with `wide` 16 also of its gradients and AdamW's moments."""
    hidden, layers, inner, vocabulary = sizes
    in_blocks = {"int8": 1.0, "int4": 0.52}.get(recipe.model.quantization or "", wide)
    return layers * (4 * hidden**2 + 3 * hidden * inner) * in_blocks + vocabulary * hidden * wide


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """(hidden, layers, inner, vocabulary); of a mixture the inner size of the experts that a token goes through."""
    part = config.get("text_config") or config
    found = {what: next((part[name] for name in names if part.get(name)), None) for what, names in NAMES.items()}
    vocabulary = embedding_rows(dict(config))
    if not found["hidden"] or not found["layers"] or not vocabulary:
        return None
    inner = found["inner"] or 4 * found["hidden"]
    if isinstance(inner, list):  # one a layer
        inner = max(inner)
    experts = part.get("num_experts_per_tok") or part.get("num_experts_per_token")
    if experts:
        inner = experts * (part.get("moe_intermediate_size") or inner)
    return int(found["hidden"]), int(found["layers"]), int(inner), int(vocabulary)
