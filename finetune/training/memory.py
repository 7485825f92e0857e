"""How many tokens there is memory for in a training pass, from config.json alone: a cautious estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
    "expert": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
}


class Sizes(NamedTuple):
    hidden: int
    layers: int
    inner: int
    """Of a mixture, of the experts that a token goes through."""
    held: int
    """The same of all experts."""
    vocabulary: int


def room(recipe: Recipe, config: Mapping[str, Any], machine: Hardware) -> int | None:
    """Tokens per pass, at least 1; None where the config does not say how large the model is."""
    sizes = _sizes(config)
    if sizes is None or not machine.memory_gb:
        return None
    needs = _needs(sizes, recipe, machine)
    sequences = 2 if recipe.stage in PAIRS else 1
    return max(1, int((_free(machine) - needs.held) / needs.per_token / sequences))


class Needs(NamedTuple):
    """Bytes."""

    held: float
    """The whole time: weights; of full fine-tuning also gradients and moments."""
    per_token: float
    """Of a training pass."""


def _needs(sizes: Sizes, recipe: Recipe, machine: Hardware) -> Needs:
    hidden, layers, inner, _, vocabulary = sizes
    train, full = recipe.train, recipe.adapter.method == "full"
    wide = 4 if recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and not machine.bf16) else 2
    block = (OF_HIDDEN * hidden + OF_INNER * inner) * wide
    recomputed = machine.device != "cpu" if train.gradient_checkpointing is None else train.gradient_checkpointing
    kept = layers * hidden * wide + block if recomputed else layers * block
    head = 0 if recipe.stage == "reward" else OF_VOCABULARY * vocabulary * 4
    return Needs(_weights(sizes, recipe, 16 if full else wide), kept + head)


def _free(machine: Hardware) -> float:
    return machine.memory_gb * 1e9 * SHARE.get(machine.device, OF_A_GPU)


def figures(recipe: Recipe, config: Mapping[str, Any], machine: Hardware, rows: int, length: int) -> str | None:
    """What a pass takes, in words, for the message when memory runs out; None where the config does not say how large
    the model is.

    Args:
        rows: of a pass; length: tokens of the longest row.
    """
    sizes = _sizes(config)
    if sizes is None:
        return None
    held, per_token = _needs(sizes, recipe, machine)
    tokens = rows * length * (2 if recipe.stage in PAIRS else 1)
    return (
        f"about {held / 1e9:,.3g} GB for the weights and {tokens * per_token / 1e9:,.3g} GB for a pass of {rows} rows "
        f"of up to {length:,} tokens, of {machine.memory_gb:,.3g} GB"
    )


def ways_out(recipe: Recipe, rows: int, length_key: str) -> list[str]:
    """The cheapest ways to need less memory, in speed and in what is learned, the cheapest first."""
    train, quantized = recipe.train, recipe.model.quantization is not None
    found = []
    if rows > 1:
        what = "train.auto_find_batch_size: true halves the rows of a pass by itself (the result is the same)"
        found.append(
            f"train.per_device_train_batch_size: {rows // 2} (the result is the same)"
            if train.auto_find_batch_size
            else f"train.per_device_train_batch_size: {rows // 2}, or {what}"
        )
    if not train.gradient_checkpointing:
        found.append("train.gradient_checkpointing: true (a step takes about a third longer)")
    if recipe.adapter.method == "full":
        found.append("adapter.method: lora (gradients and moments of few weights)")
    elif not quantized:
        found.append("model.quantization: int4 (a quarter of the weights' memory, slightly other answers)")
    return [*found, f"a shorter {length_key}"][:WAYS]


WAYS = 3


def _weights(sizes: Sizes, recipe: Recipe, wide: int) -> float:
    """Bytes of the base; with `wide` 16 also of its gradients and AdamW's moments."""
    in_blocks = {"int8": 1.0, "int4": 0.52}.get(recipe.model.quantization or "", wide)
    block = 4 * sizes.hidden**2 + 3 * sizes.hidden * sizes.held
    return sizes.layers * block * in_blocks + sizes.vocabulary * sizes.hidden * wide


def _sizes(config: Mapping[str, Any]) -> Sizes | None:
    part = config.get("text_config")
    part = part if isinstance(part, dict) and part else config
    found = {what: _number(part, names) for what, names in NAMES.items()}
    hidden, layers, vocabulary = found["hidden"], found["layers"], embedding_rows({**config, "text_config": part})
    if hidden is None or layers is None or not isinstance(vocabulary, int):
        return None
    inner = held = found["inner"] or 4 * hidden
    if found["chosen"] is not None:
        inner = held = found["expert"] or inner
        inner, held = inner * found["chosen"], held * max(found["experts"] or 0, found["chosen"])
    return Sizes(hidden, layers, inner, held, vocabulary)


def _number(part: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of these that the config has; the largest of a list with one for each layer. None for what is no
    size: transformers will say what is wrong with it."""
    for name in names:
        value = part.get(name)
        listed = [size for size in (value if isinstance(value, list) else [value]) if isinstance(size, int)]
        if listed and max(listed) > 0:
            return max(listed)
    return None
