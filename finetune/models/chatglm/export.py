"""From GlmForCausalLM back to ChatGLM's original layout.

The stock checkpoint is what save_pretrained writes. LoRA adapters from one layout to the other: adapter.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import GlmConfig, PreTrainedModel

from finetune.errors import UserError
from finetune.models.chatglm.config import glm_config
from finetune.models.chatglm.weights import FUSED, INNER, INV_FREQ, PREFIXES, SPLIT, Fused, original_shapes
from finetune.models.weight_files import read_pickle, weight_files

# What the published inference code needs beside config.json and weights; its Python is copied, never run.
COMPANIONS = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "*.py")
# What makes two configs the same network; lengths, token ids and dropout may differ.
NETWORK = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "tie_word_embeddings", "rope_parameters",
)  # fmt: skip


def export_original(
    model: PreTrainedModel, source_config: Mapping[str, Any], out: str | Path, max_shard_size: int | str = "5GB",
    source: str | Path | None = None,
) -> None:  # fmt: skip
    """Write `model` (a plain GlmForCausalLM) in the original layout described by `source_config`.

    `source` is the folder of the original checkpoint: inv_freq, tokenizer.model and the published code are taken from
    it. Raises UserError for quantized or wrapped models and where `source_config` is another network's.
    """
    _plain(model, out)
    _same_network(model.config, source_config, out)
    fused, state = Fused.of(source_config), dict(model.state_dict())
    weights: dict[str, torch.Tensor] = {}
    for name in list(state):
        if SPLIT[0] in name:
            q, k, v = (state.pop(name.replace(SPLIT[0], other)) for other in SPLIT)
            weights[original_name(name)] = fused.join(q, k, v)
    weights |= {original_name(name): tensor for name, tensor in state.items()}
    foreign = sorted(weights.keys() ^ original_shapes(model.config, fused).keys())
    if foreign:
        raise UserError(f"{foreign[0]} does not belong in this layout", path=out, fix="merge or unload adapters first")
    stored = _stored_inv_freq(source) if source else None
    weights[INV_FREQ] = inv_freq(fused.head_dim, model.dtype) if stored is None else stored
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, out, max_shard_size=max_shard_size, metadata={"format": "pt"})
    config = dict(source_config)
    if "torch_dtype" in config:
        config["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for pattern in COMPANIONS if source else ():
        for file in Path(source or "").glob(pattern):
            shutil.copyfile(file, out / file.name)


def original_config(config: GlmConfig, name_or_path: str = "THUDM/chatglm3-6b") -> dict[str, Any]:
    """An original config.json that `glm_config` maps back to `config`. UserError for what the layout cannot hold."""
    rope = config.rope_parameters
    ratio = rope["factor"] if rope["rope_type"] == "linear" else rope["rope_theta"] / 10000
    written = {
        "_name_or_path": name_or_path,
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "kv_channels": config.head_dim,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "padded_vocab_size": config.vocab_size,
        "vocab_size": config.vocab_size,
        "seq_length": config.max_position_embeddings,
        "layernorm_epsilon": config.rms_norm_eps,
        "add_qkv_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "torch_dtype": "float32",
        "use_cache": True,
        # Constant in every published checkpoint; the published code's own defaults differ for some.
        **{"add_bias_linear": False, "apply_query_key_layer_scaling": True, "bias_dropout_fusion": True},
        **{"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True},
        **{"fp32_residual_connection": False, "hidden_dropout": 0.0, "original_rope": True, "post_layer_norm": True},
        **{"pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0, "rmsnorm": True},
        "tie_word_embeddings": False,
    }
    _same_network(config, written, name_or_path)
    return written


def original_name(name: str) -> str:
    """Original name of a native weight or module; any of q, k and v gives the fused name."""
    for old, new in PREFIXES.items():
        if name.startswith(new):
            name = old + name.removeprefix(new)
    for old, new in [*INNER.items(), *((FUSED, split) for split in SPLIT)]:
        name = name.replace(new, old)
    return name


def inv_freq(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The original code's derived buffer, computed as it does: in the weights' precision and without rope_ratio."""
    half = head_dim // 2
    return 1.0 / (10000 ** (torch.arange(0, half, 2).to(dtype) / half))


def _stored_inv_freq(folder: str | Path) -> torch.Tensor | None:
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                if INV_FREQ in tensors.keys():  # noqa: SIM118
                    return tensors.get_tensor(INV_FREQ)
        else:
            state = read_pickle(file)
            if INV_FREQ in state:
                return state[INV_FREQ].clone()
    return None


def _plain(model: PreTrainedModel, out: str | Path) -> None:
    if getattr(model, "is_quantized", False) or any(not p.is_floating_point() for p in model.parameters()):
        raise UserError("a quantized model has no place in this layout", path=out, fix="dequantize it first")
    if any(p.is_meta for p in model.parameters()):
        raise UserError("weights are offloaded", path=out, fix="load the model without device_map for the export")
    if getattr(model.config, "model_type", None) != "glm" or any("lora_" in n for n, _ in model.named_parameters()):
        raise UserError(f"{type(model).__name__} is not a plain Glm model", path=out, fix="merge adapters first")


def _same_network(config: GlmConfig, source_config: Mapping[str, Any], path: str | Path) -> None:
    """UserError if `source_config` does not describe exactly the network of `config`."""
    described = glm_config(source_config, path, rope=config.rope_parameters)
    for key in NETWORK:
        ours, theirs = getattr(config, key), getattr(described, key)
        if ours != theirs:
            message = f"the model has {ours!r}, the original config.json means {theirs!r}"
            raise UserError(message, path=path, key=key, fix="export with --format hf")
