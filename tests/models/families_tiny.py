"""Random tiny checkpoints of every family, on disk, with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# name: (model_type, what differs from the type's defaults)
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "llama3-gqa-tied": ("llama", {**GROUPED, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-biased": ("llama", {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-tied": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**GROUPED, **MOE, "shared_expert_intermediate_size": 32}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", {**GROUPED, **MOE, "head_dim": 16}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 64}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 16}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi": ("phi", SMALL),
    "phi3": ("phi3", GROUPED),
    "falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "glm": ("glm", {**GROUPED, "head_dim": 16}),
    "glm4": ("glm4", {**GROUPED, "head_dim": 16}),
}


def write(folder: Path, name: str | tuple[str, dict[str, Any]], seed: int = 0, **changes: Any) -> Path:
    """A checkpoint whose attention matters in its logits; with the default initialisation it hardly does.

    name: of NETWORKS, or what would stand there.
    """
    kind, values = NETWORKS[name] if isinstance(name, str) else name
    tokenizer = make_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    longest = {} if kind in ("gpt2", "bloom") else {"max_position_embeddings": 512}
    common = {"vocab_size": len(tokenizer), **ids, **longest}
    config = AutoConfig.for_model(kind, **{**common, **values, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
