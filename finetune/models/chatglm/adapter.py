"""LoRA adapters between ChatGLM's original layout (`query_key_value`, `dense`, …) and the native one, exactly.

To native: q, k and v share A and get their rows of B. To original: A is stacked and B block-diagonal, so rank and alpha
of `query_key_value` grow threefold; where q, k and v share one A (an adapter that came from there) it stays one.
`config` is the original config.json, which knows how the fused rows lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key

from finetune import register
from finetune.errors import UserError
from finetune.models import adapter_files
from finetune.models.chatglm.export import original_name
from finetune.models.chatglm.weights import FUSED, INNER, PREFIXES, SPLIT, Fused
from finetune.models.weight_files import tensors

WRAPPER = "base_model.model."
ROWS = ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_magnitude_vector.weight", "bias")
"""What of a LoRA layer has one entry per output row; the rest (A) has none."""
LAYOUT_FREE = ("PROMPT_TUNING", "P_TUNING")  # only embeddings of virtual tokens
SAVED = {old.split(".")[-2]: new.split(".")[-2] for old, new in PREFIXES.items()}
"""Last names of what modules_to_save may hold: output_layer -> lm_head, …"""

Weights = dict[str, torch.Tensor]


def adapter_for_glm(folder: Path, config: Mapping[str, Any]) -> tuple[PeftConfig, Weights] | None:
    """As `convert_adapter_from_original`; None for an adapter that fits GlmForCausalLM as it is."""
    return convert_adapter_from_original(folder, config) if is_original_adapter(folder) else None


def is_original_adapter(folder: str | Path) -> bool:
    """True if the adapter's weights carry original names."""
    return any(name.startswith(WRAPPER + "transformer.") for name in adapter_files.shapes(Path(folder)))


def convert_adapter_from_original(folder: str | Path, config: Mapping[str, Any]) -> tuple[PeftConfig, Weights]:
    """(LoRA config, weights) for GlmForCausalLM. UserError for adapter types that are tied to the layout."""
    adapter, weights = _read(folder)
    if not isinstance(adapter, LoraConfig):
        return adapter, weights
    fused, native = Fused.of(config), {}
    ranks: dict[str, tuple[int, float]] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(WRAPPER)
        if FUSED in name:
            rows = name.split(FUSED)[1] in ROWS
            parts = fused.split(tensor) if rows else (tensor, tensor.clone(), tensor.clone())
            for split, part in zip(SPLIT, parts, strict=True):
                native[native_name(name.replace(FUSED, split))] = part.contiguous()
        else:
            native[native_name(name)] = tensor
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            module = name.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            own = (tensor.shape[0], _alpha(adapter, module))
            for split in SPLIT if f"{module}.".endswith(FUSED) else ("",):
                target = native_name(f"{module}.".replace(FUSED, split) if split else f"{module}.")
                ranks[target.removesuffix(".")] = own
    return _config(adapter, ranks, SAVED, config["num_layers"]), {WRAPPER + k: v for k, v in native.items()}


def convert_adapter_to_original(folder: str | Path, config: Mapping[str, Any]) -> tuple[PeftConfig, Weights]:
    """(LoRA config, weights) for the original layout. UserError for what it cannot hold."""
    adapter, weights = _read(folder)
    if not isinstance(adapter, LoraConfig):
        return adapter, weights
    fused, state = Fused.of(config), {key.removeprefix(WRAPPER): value for key, value in weights.items()}
    layers = sorted({name.split(split)[0] for name in state for split in SPLIT if split in name})
    shared = all(_shares_a(adapter, state, layer) for layer in layers)
    original: Weights = {}
    ranks: dict[str, tuple[int, float]] = {}
    for layer in layers:
        parts = [
            {key.removeprefix(layer + split): state.pop(key) for key in sorted(state) if key.startswith(layer + split)}
            for split in SPLIT
        ]
        alphas = [_alpha(adapter, (layer + split).removesuffix(".")) for split in SPLIT]
        joined, own = _fuse(adapter, fused, parts, alphas, shared, folder)
        original |= {original_name(f"{layer}{SPLIT[0]}{suffix}"): tensor for suffix, tensor in joined.items()}
        ranks[original_name(layer + SPLIT[0]).removesuffix(".")] = own
    for name, tensor in state.items():
        original[original_name(name)] = tensor
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            module = name.removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")
            ranks[original_name(f"{module}.").removesuffix(".")] = (tensor.shape[0], _alpha(adapter, module))
    saved = {new: old for old, new in SAVED.items()}
    return _config(adapter, ranks, saved, config["num_layers"]), {WRAPPER + k: v for k, v in original.items()}


def native_name(name: str) -> str:
    """Native name of an original weight or module, but for the fused one, which becomes three."""
    for old, new in PREFIXES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    for old, new in INNER.items():
        name = name.replace(old, new)
    return name


def _read(folder: str | Path) -> tuple[PeftConfig, Weights]:
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError("no adapter_config.json", path=folder, fix="name an adapter folder")
    register()
    adapter = PeftConfig.from_pretrained(str(folder))
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if kind != "LORA" and kind not in LAYOUT_FREE:
        raise UserError(
            f"a {kind} adapter belongs to the layout it was trained in", path=folder, fix="only LoRA can be converted"
        )
    return adapter, dict(tensors(adapter_files.weights(Path(folder))))


def _alpha(adapter: LoraConfig, module: str) -> float:
    pattern = get_pattern_key(adapter.alpha_pattern.keys(), module)
    return float(adapter.alpha_pattern.get(pattern, adapter.lora_alpha))


def _scale(adapter: LoraConfig, rank: int, alpha: float) -> float:
    return float(alpha / (rank**0.5 if adapter.use_rslora else rank))


def _shares_a(adapter: LoraConfig, state: Weights, layer: str) -> bool:
    """Do q, k and v of this layer have one and the same A and alpha?"""
    inputs = [state.get(f"{layer}{split}lora_A.weight") for split in SPLIT]
    alphas = {_alpha(adapter, (layer + split).removesuffix(".")) for split in SPLIT}
    first = inputs[0]
    return first is not None and len(alphas) == 1 and all(a is not None and torch.equal(a, first) for a in inputs)


def _fuse(
    adapter: LoraConfig, fused: Fused, parts: list[Weights], alphas: list[float], shared: bool, folder: str | Path
) -> tuple[Weights, tuple[int, float]]:
    """LoRA weights of q, k and v (each may be absent) as those of query_key_value, with its rank and alpha."""
    joined: Weights = {}
    for suffix in sorted({suffix for part in parts for suffix in part} - {"lora_A.weight", "lora_B.weight"}):
        if suffix not in ROWS or any(suffix not in part for part in parts):
            raise UserError(
                f"{suffix} of q_proj, k_proj and v_proj cannot be joined when one lacks it", path=folder,
                fix="train q_proj, k_proj and v_proj together",
            )  # fmt: skip
        joined[suffix] = fused.join(*(part[suffix] for part in parts))
    present = [i for i, part in enumerate(parts) if "lora_A.weight" in part]
    ranks = [parts[i]["lora_A.weight"].shape[0] for i in present]
    if shared:
        joined["lora_A.weight"] = parts[0]["lora_A.weight"]
        joined["lora_B.weight"] = fused.join(*(part["lora_B.weight"] for part in parts))
        return joined, (ranks[0], alphas[0])
    total, scales = sum(ranks), [_scale(adapter, r, alphas[i]) for i, r in zip(present, ranks, strict=True)]
    blocks = [parts[present[0]]["lora_B.weight"].new_zeros(rows, total) for rows in fused.rows]
    column = 0
    for i, rank, scale in zip(present, ranks, scales, strict=True):
        # One alpha serves all three; where theirs differ the ratio moves into B.
        output = parts[i]["lora_B.weight"]
        blocks[i][:, column : column + rank] = output if scale == scales[0] else output * (scale / scales[0])
        column += rank
    joined["lora_A.weight"] = torch.cat([parts[i]["lora_A.weight"] for i in present])
    joined["lora_B.weight"] = fused.join(*blocks)
    return joined, (total, scales[0] * (total**0.5 if adapter.use_rslora else total))


def _config(adapter: LoraConfig, ranks: dict[str, tuple[int, float]], saved: dict[str, str], layers: int) -> LoraConfig:
    """`adapter` with targets and patterns for the modules (full names) in `ranks`: name -> rank, alpha."""
    by_name: dict[str, dict[str, tuple[int, float]]] = {}
    for module, own in ranks.items():
        by_name.setdefault(module.rsplit(".", 1)[-1], {})[module] = own
    targets: set[str] = set()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for short, modules in by_name.items():
        everywhere = len(modules) == layers or all(".layers." not in module for module in modules)
        uniform = everywhere and len(set(modules.values())) == 1
        for name, (rank, alpha) in {short: next(iter(modules.values()))}.items() if uniform else modules.items():
            targets.add(name)
            alpha = int(alpha) if alpha == int(alpha) else alpha
            if rank != adapter.r:
                rank_pattern[name] = rank
            if alpha != adapter.lora_alpha:
                alpha_pattern[name] = alpha
    modules_to_save = [saved.get(name.split(".")[-1], name) for name in adapter.modules_to_save or []] or None
    return replace(
        adapter, target_modules=targets, exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, modules_to_save=modules_to_save,
    )  # fmt: skip
