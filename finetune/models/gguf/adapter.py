"""A LoRA adapter as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from finetune import __version__
from finetune.errors import UserError
from finetune.models import adapter_files
from finetune.models.gguf import layout
from finetune.models.gguf.header import check_package, read_header
from finetune.models.gguf.places import MADE
from finetune.models.weight_files import read_json, tensors

MERGE = "merge it: ft merge --format gguf writes the whole model"
FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight$")
EXACT = 1e-6
"""What a layer read back may miss, of its size: the scale is folded in in float32."""


def write_adapter(adapter: Path, base: Path, path: Path) -> int:
    """The number of layers. UserError, before anything is written, for what llama.cpp does not load; read back and
    compared before it is done.

    Args:
        adapter: folder of peft's files; base: folder of the model it was trained on; path: nobody's yet.
    """
    check_package(path)
    architecture = layout.check_type(read_json(base / "config.json"), adapter)
    config = AutoConfig.from_pretrained(str(base))
    settings = adapter_files.described(adapter)
    check_settings(settings, adapter)
    pairs, renamed = factors(adapter), layout.names(config)
    for name in pairs:
        to = renamed(f"{name}.weight")
        if to is None or name.endswith("embed_tokens") or (name == "lm_head" and config.tie_word_embeddings):
            refuse(f"changes {name}, and llama.cpp adds no adapter there", adapter)
    scales = {name: adapter_files.scale_of(settings, name) for name in pairs}
    # One alpha for the file: llama.cpp divides it by the layer's own rank. What differs is folded into B.
    alpha = scales[first := next(iter(pairs))] * pairs[first][1].shape[1]
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, value in {"general.type": "adapter", "adapter.type": "lora", MADE: __version__}.items():
            writer.add_string(key, value)
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, (a, b) in pairs.items():
            to = renamed(f"{name}.weight")
            b = layout.stored(f"{name}.lora", b * (scales[name] * b.shape[1] / alpha), config)
            writer.add_tensor(f"{to}.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{to}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    check_written(path, pairs, scales, config, adapter)
    return len(pairs)


def refuse(what: str, path: Path) -> None:
    raise UserError(what, path=path, key="--for", fix=MERGE)


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """UserError for what is more than two matrices beside a linear layer."""
    reasons = {
        f"is of the kind {settings['peft_type']}, and llama.cpp loads LoRA only": settings["peft_type"] != "LORA",
        "is DoRA, which llama.cpp does not load": settings.get("use_dora"),
        "trains whole modules (modules_to_save)": settings.get("modules_to_save"),
        "trains biases": settings.get("bias") not in (None, "none") or settings.get("lora_bias"),
        "trains single tokens (trainable_token_indices)": settings.get("trainable_token_indices"),
        "trains parameters that are no layers (target_parameters)": settings.get("target_parameters"),
        "takes activated tokens (aLoRA)": settings.get("alora_invocation_tokens"),
    }
    for what in (words for words, found in reasons.items() if found):
        refuse(what, path)


def factors(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> (A, B), in float32. UserError for other weights."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in tensors(adapter_files.weights(adapter)):
        match = FACTOR.match(name)
        if match is None:
            refuse(f"holds {name}, which llama.cpp has no place for", adapter)
        else:
            found.setdefault(match[1], {})[match[2]] = weight.float()
    return {name: (pair["A"], pair["B"]) for name, pair in sorted(found.items())}


def check_written(path: Path, pairs: Any, scales: dict[str, float], config: Any, adapter: Path) -> None:
    header, renamed = read_header(path), layout.names(config)
    alpha = header.values["adapter.lora.alpha"]
    for name, (a, b) in pairs.items():
        to = renamed(f"{name}.weight")
        ours = {kind: matrix(header, f"{to}.lora_{kind}") for kind in "ab"}
        back = ours["b"]
        if heads := layout.heads_of(f"{name}.lora", config) if config.model_type == "llama" else 0:
            back = layout.halves(back, heads)
        off = (back * (alpha / back.shape[1]) - b * scales[name]).abs().max().item()
        if not (torch.equal(ours["a"], a) and off <= EXACT * (b.abs().max().item() * abs(scales[name]) + 1e-30)):
            raise UserError(f"{name} does not come back from the GGUF file as it was", path=adapter, key="--for")


def matrix(header: Any, name: str) -> torch.Tensor:
    shape = header.shape(name)[::-1]
    return torch.from_numpy(np.array(header.vector(name)).reshape(shape))
