"""Random tiny checkpoints, on disk, with a byte-level tokenizer: of the families by hand, and of every type that
transformers can continue text with, shrunk by rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

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

# --- every type, shrunk ---

HIDDEN, HEADS, HEAD = 64, 4, 16
# What a config calls a size -> that size in a tiny model. Only what the type's own config has is set.
SIZES: dict[int, tuple[str, ...]] = {
    HIDDEN: ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim",
             "attention_hidden_size", "lru_width", "ple_embed_dim", "backbone_hidden_size"),
    2 * HIDDEN: ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner",
                 "dim_ff", "dff", "intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size",
                 "block_ff_dim", "d_inner"),
    32: ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
         "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size",
         "kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank", "index_topk", "chunk_size", "mamba_chunk_size",
         "prompt_mid_dim", "window_size", "attention_window_size", "local_attention", "attention_chunk_size",
         "prompt_types", "segment_types", "sliding_window", "sliding_window_size", "rel_extent"),
    HEADS: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_experts",
            "num_local_experts", "n_routed_experts", "moe_num_experts", "index_n_heads", "linear_num_value_heads",
            "linear_num_heads", "swa_num_attention_heads", "encoder_attention_heads", "mamba_dt_rank", "time_step_rank",
            "num_decoder_attention_heads", "num_attention_heads_per_layer", "num_encoder_attention_heads",
            "zero_expert_num"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_decoder_layers", "num_encoder_layers", "num_experts_per_tok", "num_experts_per_token", "moe_topk",
        "top_k_experts", "moe_k", "linear_num_key_heads", "swa_num_key_value_heads", "o_groups", "prompt_length",
        "n_layers_per_attn_res_block", "num_layers_per_stack"),
    1: ("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "mamba_ngroups", "n_groups", "n_shared_experts",
        "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "moe_topk_group",
        "index_topk_blocks", "num_mem_blocks"),
    HEAD: ("head_dim", "dim_head", "attention_head_dim", "attention_head_size", "kv_channels", "v_head_dim",
           "qk_nope_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim",
           "swa_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "query_pre_attn_scalar", "d_kv",
           "laurel_rank", "hidden_size_per_layer_input", "global_head_dim", "mamba_head_dim", "mamba_d_head",
           "mamba_headdim", "index_block_size", "gated_norm_rank", "num_centroids", "adapter_rank"),
    8: ("qk_rope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    512: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length", "keep_window_size"),
    0: ("moe_layer_start_index", "num_kv_shared_layers", "num_nextn_predict_layers"),
    -1: ("moe_layer_end_index",),
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
SIZE = {name: size for size, names in SIZES.items() for name in names}
KEY_VALUE = {"num_key_value_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads"}
NEEDED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts",
          "moe_intermediate_size", "moe_k")  # fmt: skip
"""Set where the type's default is nothing, too: published configs have them."""
FACTORS = {
    "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.25, "key_multiplier": 0.5,
}  # fmt: skip
"""Set where the type's default, 1, would hide whether they are followed."""
PER_LAYER = (
    "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "no_rope_layers", "layer_rope_theta",
    "activation_sparsity_pattern",
)  # fmt: skip
"""Lists with an entry for each layer."""
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def layers_of(config: dict[str, Any]) -> list[int]:
    """The layers that are kept: the first of each kind, at least two."""
    lists = [config[name] for name in PER_LAYER if isinstance(config.get(name), list)]
    first = {kinds: i for i, kinds in reversed([*enumerate(zip(*lists, strict=False))])}
    kept = sorted(first.values())
    return kept + (kept or [0])[-1:] * (2 - len(kept))


def small(config: dict[str, Any]) -> dict[str, Any]:
    """What to change in a type's default config (as a dict, with those of its parts) to make it tiny."""
    sized = {name: SIZE[name] for name, value in config.items() if name in SIZE and isinstance(value, int)}
    sized |= {name: factor for name, factor in FACTORS.items() if config.get(name) == 1.0}
    sized |= {name: SIZE[name] for name in NEEDED if name in config and name in SIZE}
    for name, heads in KEY_VALUE.items():  # as many as heads, one, or half
        if name in config:
            sized[name] = HEADS if config[name] == config.get(heads) else 1 if config[name] == 1 else HEADS // 2
    if config.get("head_dim") is not None and config["head_dim"] == config.get("qk_rope_head_dim"):
        sized["head_dim"] = sized["qk_rope_head_dim"]  # the same number by another name
    layers = layers_of(config)
    sized |= {name: len(layers) for name in LAYERS if name in sized}
    sized |= {name: [config[name][i] for i in layers] for name in PER_LAYER if isinstance(config.get(name), list)}
    sized |= {name: [SIZE[name]] * len(layers) for name in SIZE if isinstance(config.get(name), list)}
    if other := config.get("per_layer_config"):  # {layer: what it has otherwise}
        other = {int(layer): small(values) for layer, values in other.items()}
        sized["per_layer_config"] = {new: other[old] for new, old in enumerate(layers) if old in other}
    for name, part in config.items():
        if isinstance(part, dict) and "model_type" in part:
            sized[name] = small(part)
    return sized | EXCEPTIONS.get(config.get("model_type", ""), {})


PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
# model_type -> what the rules cannot know.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "dots3_note_text": {"head_dim": HEAD + 8},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1], "num_hidden_layers": 4},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": PERIODS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, **HYBRID},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "mamba_headdim": HEAD, **HYBRID},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def shrunk(kind: str) -> Any:
    """The config of a tiny model of this type, with the tokenizer's vocabulary."""
    config = CONFIG_MAPPING[kind]().to_dict()
    values = small(config)
    vocabulary = {"vocab_size": len(make_tokenizer()), **TOKENS}
    for part in (config, *config.values()):
        if isinstance(part, dict) and "vocab_size_per_layer_input" in part:
            vocabulary["vocab_size_per_layer_input"] = vocabulary["vocab_size"]
    for part in (values, *(v for v in values.values() if isinstance(v, dict) and "hidden_size" in v)):
        part |= vocabulary
    return AutoConfig.for_model(kind, **values)


def write(folder: Path, name: str | tuple[str, dict[str, Any]], seed: int = 0, **changes: Any) -> Path:
    """A checkpoint of a network by hand, with `changes`; name: of NETWORKS, or what would stand there."""
    kind, values = NETWORKS[name] if isinstance(name, str) else name
    longest = {} if kind in ("gpt2", "bloom") else {"max_position_embeddings": 512}
    common = {"vocab_size": len(make_tokenizer()), **TOKENS, "bos_token_id": None, **longest}
    return write_config(folder, AutoConfig.for_model(kind, **{**common, **values, **changes}), seed)


def write_config(folder: Path, config: Any, seed: int = 0) -> Path:
    """A checkpoint whose attention matters in its logits; with the default initialisation it hardly does."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def without_gradient(model: Any, ids: torch.Tensor) -> list[str]:
    """The trained parameters that none reaches after an evaluation. LoRA's B, which begins at 0, is drawn first."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, grad in trained if grad is None or not grad.any()]
