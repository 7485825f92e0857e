"""What transformers' reader of GGUF files leaves at its classes' defaults although the file says it. No torch.

Most of it is positions: a Llama 3 file that is read without its scaling has other low frequencies than it was trained
with, and answers almost as well.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from finetune.errors import UserError
from finetune.models.gguf.header import KEY, Header

# Key of the architecture's section -> attribute of the config, where it has one.
SAME = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
BY_HIDDEN_SIZE = {("gemma2", 46), ("gemma3", 62)}  # the 27B's: queries are scaled by hidden size / heads
LLAMA3_LENGTHS = (8192, 4096, 2048, 16384, 32768)  # original lengths that are tried; all published ones have the first
OWN_FREQUENCIES = {"gemma4"}  # rope_freqs.weight repeats what the config class does by itself
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
USED = {FREQUENCIES, LONG, SHORT}  # tensors that become config.json
INSTEAD = "use the model's folder of safetensors"


def correct(config: Any, header: Header) -> None:
    """Set what the file says, in place. UserError for positions that config.json cannot express."""
    for key in ("_model_name_or_path", "unk_token_id"):
        vars(config).pop(key, None)
    rows = header.shape("token_embd.weight")
    if len(rows) == 2:
        config.vocab_size = rows[1]
    for key, name in SAME.items():
        if header.get(key) is not None and hasattr(config, name) and header.architecture != "gemma4":
            setattr(config, name, header.get(key))
    if header.architecture in ("gemma2", "gemma3"):
        by_size = (header.architecture, config.num_hidden_layers) in BY_HIDDEN_SIZE
        wide = config.hidden_size // config.num_attention_heads if by_size else config.head_dim
        config.query_pre_attn_scalar = wide
    if getattr(config, "rope_parameters", None):
        positions(config, header)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, key, float(str(np.float32(value))))  # 1e-06, not its neighbour in 64 bits


def positions(config: Any, header: Header) -> None:
    nested = isinstance(config.rope_parameters.get("full_attention"), dict)
    full = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    if nested and (local := header.get("rope.freq_base_swa")) is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = local
    full.update(scaling(config, header))
    width = header.get("attention.key_length") or config.hidden_size // config.num_attention_heads
    part = header.get("rope.dimension_count", width) / width
    if not nested and part != full.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)):
        if "partial_rotary_factor" not in full and not hasattr(config, "partial_rotary_factor"):
            refuse(header.path, f"turns {part:.0%} of each head by its position, which {config.model_type} cannot")
        full["partial_rotary_factor"] = part
        if hasattr(config, "partial_rotary_factor"):
            config.partial_rotary_factor = part


def scaling(config: Any, header: Header) -> dict[str, Any]:
    """The part of rope_parameters that is about longer contexts; {} for none."""
    kind = header.get("rope.scaling.type", "linear" if header.get("rope.scale_linear") else "none")
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    original = header.get("rope.scaling.original_context_length")
    if FREQUENCIES in header.tensors and header.architecture not in OWN_FREQUENCIES:
        return llama3(config, header.vector(FREQUENCIES), header.path)
    if LONG in header.tensors:
        found = {"rope_type": "longrope", "original_max_position_embeddings": original}
        found |= {"long_factor": header.vector(LONG).tolist(), "short_factor": header.vector(SHORT).tolist()}
        config.original_max_position_embeddings = original
        stretch = header.get("rope.scaling.attn_factor")
        return found | ({"attention_factor": stretch} if stretch is not None else {})
    if kind == "none" or factor in (None, 0, 1):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        refuse(header.path, f"scales its positions by {kind}")
    found = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = original or round(config.max_position_embeddings / factor)
    if (stretch := header.get("rope.scaling.attn_factor")) is not None:  # llama.cpp's is on top of the usual one
        found["attention_factor"] = stretch * (0.1 * math.log(factor) + 1)
    betas = {name: header.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return found | {name: value for name, value in betas.items() if value is not None}


def llama3(config: Any, factors: np.ndarray[Any, Any], path: Path) -> dict[str, Any]:
    """Llama 3.1's scaling from what every frequency is divided by: llama.cpp keeps the result, config.json the rule."""
    if np.all(factors == 1):
        return {}
    theta, count = config.rope_parameters["rope_theta"], len(factors)
    waves = 2 * math.pi * theta ** (np.arange(count) / count)
    for original in LLAMA3_LENGTHS:
        found = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        smooth = np.clip((original / waves - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - smooth) / found["factor"] + smooth), factors, rtol=1e-3):
            return {"rope_type": "llama3", **found, "original_max_position_embeddings": original}
    refuse(path, "scales its positions by frequencies of its own")


def refuse(path: Path, what: str) -> NoReturn:
    raise UserError(f"{what}: config.json has no word for it", path=path, key=KEY, fix=INSTEAD)
