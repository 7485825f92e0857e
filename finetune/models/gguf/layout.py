"""What a GGUF file says of a network, and how its weights lie in it, for the families that are written."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch

from finetune.errors import UserError
from finetune.models.gguf.config import BY_HIDDEN_SIZE

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
"""model_type of config.json -> architecture in the file."""
GEMMA_PERIOD = 6  # every sixth layer sees everything; llama.cpp takes it for granted
GEMMA_LOCAL_THETA = 10000.0
YARN_BOUNDS = {"beta_fast": 32, "beta_slow": 1}  # llama.cpp takes others from its command line, not from the file
NO_SCALING = "default"
HF = "use --format hf, of which vLLM and transformers read it"


def check_type(config: dict[str, Any], path: Any) -> str:
    """The architecture, of config.json. UserError for a family that is not written, or weights that are quantized."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"is a {kind}, and GGUF files are written of {known}", path=path, key="--format", fix=HF)
    if config.get("quantization_config"):
        what = "holds quantized weights, which do not go into a GGUF file as they are"
        raise UserError(what, path=path, key="--format", fix="give the model that they were made of")
    return ARCHITECTURES[kind]


def check(config: Any, path: Any) -> None:
    """UserError for what config.json asks for and llama.cpp does not compute. Args: config: transformers'."""
    kind = config.model_type

    def has(name: str, usual: Any = False) -> bool:
        return (getattr(config, name, usual) or usual) != usual

    gemma = kind == "gemma3_text"
    activation = getattr(config, "hidden_activation" if gemma else "hidden_act", None)
    period = ["full_attention" if (n + 1) % GEMMA_PERIOD == 0 else "sliding_attention" for n in range(layers(config))]
    wide = config.hidden_size // config.num_attention_heads if ("gemma3", layers(config)) in BY_HIDDEN_SIZE else None
    reasons = {
        "biases on attention (attention_bias)": kind != "qwen2" and has("attention_bias"),
        "biases on the feed-forward part (mlp_bias)": has("mlp_bias"),
        f"the activation {activation}": activation not in (("gelu_pytorch_tanh",) if gemma else ("silu", "swish")),
        "positions on a part of each head": (rope(config).get("partial_rotary_factor") or 1) != 1,
        "a sliding window": not gemma and has("use_sliding_window"),
        "another order of sliding and full attention": gemma and list(config.layer_types) != period,
        "softcapped logits": has("final_logit_softcapping", None) or has("attn_logit_softcapping", None),
        "another scale of attention": gemma and config.query_pre_attn_scalar != (wide or config.head_dim),
        "another base of the local positions": gemma and local_theta(config) != GEMMA_LOCAL_THETA,
        "attention in both directions": has("use_bidirectional_attention"),
    }
    for what in (words for words, found in reasons.items() if found):
        raise UserError(f"has {what}, which llama.cpp does not compute for {kind}", path=path, key="--format", fix=HF)
    scaling(config, path)


def layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def rope(config: Any) -> dict[str, Any]:
    """rope_parameters, of the layers that see everything."""
    found = dict(config.rope_parameters)
    return dict(found["full_attention"]) if isinstance(found.get("full_attention"), dict) else found


def local_theta(config: Any) -> float:
    return float(config.rope_parameters["sliding_attention"]["rope_theta"])


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def values(config: Any, path: Any) -> dict[str, Any]:
    """Metadata of the architecture's own section, without its name in front."""
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": layers(config), "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim(config), "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps), "rope.dimension_count": head_dim(config),
        "rope.freq_base": float(rope(config)["rope_theta"]), "vocab_size": config.vocab_size,
    }  # fmt: skip
    if config.model_type == "gemma3_text":
        found |= {"attention.sliding_window": config.sliding_window, "rope.freq_base_swa": local_theta(config)}
    return found | scaling(config, path)


def scaling(config: Any, path: Any) -> dict[str, Any]:
    """Metadata of what stretches positions. UserError for what llama.cpp has no word for."""
    said = rope(config)
    kind = said.get("rope_type", NO_SCALING)
    if kind in (NO_SCALING, "llama3"):  # the latter is a tensor
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(said["factor"])}
    odd = [name for name in ("mscale", "mscale_all_dim") if said.get(name)]
    odd += [] if said.get("truncate", True) else ["truncate"]
    odd += [name for name, usual in YARN_BOUNDS.items() if said.get(name) not in (None, usual)]
    if kind != "yarn" or odd:
        what = f"scales its positions by {' with '.join([kind, *odd])}, which llama.cpp does not take from a file"
        raise UserError(what, path=path, key="--format", fix=HF)
    factor = float(said["factor"])
    original = said.get("original_max_position_embeddings") or config.max_position_embeddings
    found = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": factor, "rope.scaling.original_context_length": original,
    }  # fmt: skip
    if (stretch := said.get("attention_factor")) is not None:  # llama.cpp's is on top of the usual one
        found["rope.scaling.attn_factor"] = float(stretch) / (0.1 * math.log(factor) + 1)
    return found


def frequencies(config: Any) -> np.ndarray[Any, Any] | None:
    """What every frequency is divided by, where that is a tensor of the file: Llama 3's scaling."""
    if rope(config).get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / rope(config)["rope_theta"] ** (torch.arange(0, head_dim(config), 2).double() / head_dim(config))
    return (plain / scaled.double()).float().numpy()


def names(config: Any) -> Any:
    """Of (name in the network): name in the file, or None."""
    gguf = importlib.import_module("gguf")
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(number, layers(config))
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def stored(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """A weight as the file holds it: queries and keys of Llama with the pairs that turn together side by side, norms of
    Gemma with the 1 that the network adds."""
    if config.model_type == "llama" and (heads := heads_of(name, config)):
        return side_by_side(weight, heads)
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return weight.float() + 1
    return weight


def heads_of(name: str, config: Any) -> int:
    """Of queries and keys; 0 for other weights."""
    kind = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return next((count for word, count in kind.items() if f".{word}." in f"{name}."), 0)


def side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """(rows, ...): of each head its rows 0, n/2, 1, n/2 + 1, ..."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back from side_by_side."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def refuse_weight(name: str, config: Any, path: Any) -> None:
    what = f"holds {name}, which a GGUF file of {config.model_type} has no place for"
    raise UserError(what, path=path, key="--format", fix=HF)
