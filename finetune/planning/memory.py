"""Bytes by part at the moment when most are in use."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from finetune.adapters.methods import METHODS
from finetune.planning.network import Network
from finetune.planning.passes import PAIRS, traced
from finetune.recipe.stages import PpoRecipe, Recipe

PARTS = (
    "weights", "adapter", "gradients", "optimizer", "activations", "logits", "kv_cache", "ppo", "framework",
    "fragmentation",
)  # fmt: skip
FRAMEWORK = {"cuda": 0.6e9, "cpu": 0.9e9}
"""Bytes that are no tensors: the CUDA context with its kernels; Python with the libraries."""
FRAGMENTED = {"cuda": 0.05}
"""Of what comes and goes, what the allocator holds and cannot use: an assumption, not measured."""
BLOCK_8BIT, LEAST_8BIT = 256, 4096  # bitsandbytes: values that share a scale; smaller tensors stay in float32


class Moment(NamedTuple):
    """A stretch of a pass."""

    name: str
    level: int
    """Bytes at its start that were not there before the pass, gradients included."""
    peak: int
    """Bytes above that."""
    gradients: int
    """Bytes of gradients at its start, of those that begin in this pass."""
    flops: int


@dataclass(frozen=True)
class Estimate:
    rows: int
    length: int
    parts: dict[str, int]
    """Bytes, of PARTS."""
    when: str
    """What the run does when it needs them."""
    flops: int
    """Of a pass, forward and backward."""
    forward_flops: int
    kv_cache: int
    """Bytes of keys and values while replies are written, where some are."""

    @property
    def tensors(self) -> int:
        return sum(size for part, size in self.parts.items() if part not in ("framework", "fragmentation"))

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def estimate(network: Network, recipe: Recipe, rows: int, length: int, device: str, accumulation: int = 1) -> Estimate:
    """Of passes of `rows` rows of `length` tokens, prompts and replies of PPO together."""
    given = rows, length
    moments = timeline(network, recipe, rows, length)
    states, copies = optimizer_bytes(network.shapes, network.embedded, recipe.train.optim), copies_of(recipe)
    parts = dict.fromkeys(PARTS, 0)
    is_full = recipe.adapter.method == "full"
    parts["weights"] = network.weights + (network.trained if is_full else 0)
    parts["adapter"] = 0 if is_full else network.trained
    parts["optimizer"] = states
    two = isinstance(recipe, PpoRecipe)  # policy and value learn in turns, and step together
    kept = network.trained if accumulation > 1 or two else 0
    found = []
    for moment in moments:
        going = moment.level - moment.gradients
        logits = moment.peak if moment.name in ("head", "loss backward") else 0
        grads = max(kept, moment.gradients)
        found.append((grads + going + moment.peak, grads, going + moment.peak - logits, logits, moment.name))
    # Kernels of GPUs update in place; on CPUs AdamW makes two tensors beside the one that it is at, bitsandbytes five.
    step = network.trained, 0 if device == "cuda" else (5 if "8bit" in recipe.train.optim else 2) * network.largest
    found.append((sum(step), *step, 0, "optimizer step"))
    _, parts["gradients"], parts["activations"], parts["logits"], when = max(found)
    cache = kv_bytes(network, recipe, rows, length) if writes(recipe) else 0
    if two:
        parts["ppo"] = int(copies * network.trained + states + network.trained)
    if cache:
        writing = cache + replies_bytes(network, recipe, moments, rows)
        if writing > parts["gradients"] + parts["activations"] + parts["logits"]:
            parts["gradients"], parts["logits"], parts["kv_cache"] = 0, 0, cache
            parts["activations"], when = writing - cache, "writing replies"
    going = parts["gradients"] + parts["activations"] + parts["logits"] + parts["kv_cache"]
    parts["framework"] = int(FRAMEWORK.get(device, FRAMEWORK["cpu"]))
    parts["fragmentation"] = int(FRAGMENTED.get(device, 0.0) * going)
    forward = sum(m.flops for m in moments if "backward" not in m.name)
    return Estimate(*given, parts, said(when), sum(m.flops for m in moments), forward, cache)


def said(when: str) -> str:
    if when.startswith("forward") or when == "head":
        return "the end of the forward pass"
    if when == "loss backward":
        return "the loss's backward pass"
    return "the backward pass" if "backward" in when else when


def timeline(network: Network, recipe: Recipe, rows: int, length: int) -> list[Moment]:
    """A pass through all blocks, from the pass through those that stand for them."""
    seen = {segment.name: segment for segment in traced(network, recipe, rows, length)}
    here = [trained_bytes(block) for block in network.blocks]
    outside = network.trained - sum(here[kind] for kind in network.kinds)
    order = ["before", *(f"forward {kind}" for kind in network.kinds), "head", "loss backward"]
    order += [*(f"backward {kind}" for kind in reversed(network.kinds)), "first backward"]
    found, level, gradients = [], 0, 0
    for name in order:
        if name not in seen:
            continue  # nothing below is trained
        segment = seen[name]
        found.append(Moment(name, level, segment.peak, gradients, segment.flops))
        level += segment.net
        if name in ("head", "loss backward"):  # what it frees of the blocks that are here, it frees of all
            level -= sum(
                segment.freed.get(f"forward {kind}", 0) * (n - 1) for kind, n in Counter(network.kinds).items()
            )
        if name.startswith("backward"):
            gradients += here[int(name.split()[1])]
        elif name == "loss backward":
            gradients += min(outside, max(0, segment.net))
    return found


def trained_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def optimizer_bytes(shapes: list[torch.Size], embedded: list[torch.Size], optim: str) -> int:
    """State of an optimizer of float32 parameters, between steps; transformers keeps that of embeddings in float32."""
    whole = {"muon": "adamw"}.get(optim, optim.removeprefix("paged_").removesuffix("_8bit"))
    return int(sum(STATES[optim](shape) for shape in shapes) + sum(STATES[whole](shape) for shape in embedded))


def moments_8bit(count: int) -> Any:
    def size(shape: torch.Size) -> int:
        numel = shape.numel()
        if numel < LEAST_8BIT:
            return 4 * count * numel
        return count * (numel + 4 * -(-numel // BLOCK_8BIT))

    return size


STATES: dict[str, Any] = {
    "adamw": lambda shape: 8 * shape.numel(),
    "paged_adamw": lambda shape: 8 * shape.numel(),
    "adamw_8bit": moments_8bit(2),
    "paged_adamw_8bit": moments_8bit(2),
    "lion_8bit": moments_8bit(1),
    "lion": lambda shape: 4 * shape.numel(),
    "sgd": lambda shape: 0,
    # A row and a column for each matrix.
    "adafactor": lambda shape: 4 * ((shape.numel() // shape[-1] + shape.numel() // shape[-2]) if len(shape) > 1
                                    else shape.numel()),
    "muon": lambda shape: (4 if len(shape) == 2 else 8) * shape.numel(),
}  # fmt: skip


def copies_of(recipe: Recipe) -> int:
    """Adapters, or for separate models whole ones, that PPO holds beside the policy's: value, and where they differ
    from the base, reference and reward model."""
    if not isinstance(recipe, PpoRecipe):
        return 0
    starts = METHODS[recipe.adapter.method].starts_as_base(recipe.adapter) and recipe.model.adapter is None
    reward = recipe.reward.train is not None or recipe.reward.model is not None
    return 1 + int(not starts) + int(reward)


def writes(recipe: Recipe) -> bool:
    return recipe.stage == "ppo" or recipe.eval.during is not None


def kv_bytes(network: Network, recipe: Recipe, rows: int, length: int) -> int:
    """Keys and values of all layers while replies are written; a sliding window holds no more than its width."""
    config = network.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = length if isinstance(recipe, PpoRecipe) else length + recipe.eval.max_new_tokens
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(
        network.kinds)  # fmt: skip
    held = sum(min(longest, window) if kind == "sliding_attention" and window else longest for kind in kinds)
    return int(2 * held * heads * size * getattr(torch, recipe.model.dtype).itemsize * written_at_once(recipe, rows))


def written_at_once(recipe: Recipe, rows: int) -> int:
    if isinstance(recipe, PpoRecipe):
        return min(max(rows, recipe.eval.batch_size), recipe.train.effective_batch_size)
    return recipe.eval.batch_size


def replies_bytes(network: Network, recipe: Recipe, moments: list[Moment], rows: int) -> int:
    """What reading the prompts takes at once, and the scores of the next token in float32, thrice."""
    steps = itertools.pairwise(moments)
    reading = max((a.level + a.peak - b.level for a, b in steps if a.name.startswith("forward")), default=0)
    passes = rows * (2 if recipe.stage in PAIRS else 1)
    at_once = written_at_once(recipe, rows)
    vocabulary = network.model.config.get_text_config().vocab_size
    return int(reading * at_once / passes + 3 * 4 * vocabulary * at_once)
