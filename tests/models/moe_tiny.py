"""Random tiny mixtures of experts, one of each layout that transformers has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families_tiny as tiny

ROUTED = {
    **tiny.GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
# Whole blocks of 64 weights in every row: others bitsandbytes unpacks wrongly on CPUs.
SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 16,
}  # fmt: skip

# name -> (model_type, config): with shared experts, with dense layers before them, transposed and with biases, …
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: tiny.NETWORKS[name] for name in ("qwen3_moe", "qwen2_moe", "mixtral")},
    "glm4_moe": ("glm4_moe", {**ROUTED, "head_dim": 16, "n_group": 1}),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **LATENT, "num_key_value_heads": 4, "n_group": 2}),
    "gpt_oss": (
        "gpt_oss", {**tiny.GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                    "rope_parameters": YARN},
    ),
}  # fmt: skip


def write(folder: Path, name: str, **changes: Any) -> Path:
    kind, values = MIXTURES[name]
    return tiny.write(folder, (kind, values), **{**SIZES, **changes})
