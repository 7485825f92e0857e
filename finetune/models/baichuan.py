"""Baichuan-7B and Baichuan2-7B, loaded into transformers' LlamaForCausalLM.

Their blocks are Llama's, with q, k and v stacked in one `W_pack`. Baichuan2's head uses its rows normalised to length
one. Both are undone while the weights are read; nothing is converted on disk and the published code is never run.
The 13B models have ALiBi instead of rotary positions: refused in families.py.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from finetune.errors import UserError
from finetune.models import rope, sources
from finetune.models.weight_files import check_loading
from finetune.recipe.sections import ModelConfig

KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
SECOND = 125696
"""Vocabulary of Baichuan2, whose config.json says nothing about its head; Baichuan-7B has 64,000."""


def network(model: ModelConfig, config: dict[str, Any]) -> LlamaConfig:
    """LlamaConfig for Baichuan's config.json, with `model.rope_scaling`."""
    missing = [key for key in KEPT[:5] if config.get(key) is None]
    if missing:
        raise UserError("missing in config.json", path=model.name, key=missing[0], fix="copy it from the published one")
    values = {key: config[key] for key in KEPT if key in config}
    found = LlamaConfig(
        **{"rms_norm_eps": 1e-6, **values},
        rope_parameters={"rope_type": "default", "rope_theta": float(config.get("rope_theta") or 10000.0)},
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )
    rope.apply(found, model.rope_scaling, model.name)
    return found


class _Normalize(ConversionOps):
    """Rows of length one, for transformers' loader."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        [tensor] = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return {target_patterns[0]: torch.nn.functional.normalize(tensor.float()).to(tensor.dtype)}


def load_weights(model: ModelConfig, network: LlamaConfig, **options: Any) -> LlamaForCausalLM:
    """A stock LlamaForCausalLM."""
    kind = "Baichuan2" if network.vocab_size == SECOND else "Baichuan"
    loading: Any = type(f"{kind}AsLlama", (LlamaForCausalLM,), {"__module__": __name__})
    rules = [WeightConverter("self_attn.W_pack", [f"self_attn.{part}_proj" for part in "qkv"], [Chunk(dim=0)])]
    if kind == "Baichuan2":
        rules.append(WeightConverter("lm_head.weight", "lm_head.weight", [_Normalize()]))
    register_checkpoint_conversion_mapping(loading.__name__, rules, overwrite=True)
    loaded, info = loading.from_pretrained(
        sources.weights(model), config=network, revision=sources.hub_revision(model), output_loading_info=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    # Stock from here on: save_pretrained would otherwise write the fused names under `model_type: llama`.
    loaded.__class__ = LlamaForCausalLM
    if hasattr(loaded, "_weight_conversions"):
        del loaded._weight_conversions
    check_loading(info, model.name)
    return loaded
