"""Bases as transformers writes them: network and weights come through its own classes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.errors import UserError
from finetune.models import rope, sources
from finetune.models.failures import as_user_error
from finetune.models.weight_files import OTHER_SENSES, check_loading, read_json
from finetune.recipe.sections import ModelConfig


def check(model: ModelConfig, config: dict[str, Any]) -> None:
    """UserError unless transformers has a network that continues text for this config.json."""
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"model_type {kind!r} is no name", path=model.name, key="model.name", fix=sources.HUB_HELP)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text_kind(config) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if kind is None:
        raise UserError(
            "config.json names no model_type", path=model.name, key="model.name",
            fix="give the folder of a complete transformers checkpoint",
        )  # fmt: skip
    if kind in CONFIG_MAPPING:
        raise UserError(
            f"{kind} is no language model that continues text", path=model.name, key="model.name",
            fix="use a causal model; `ft models list` shows what is tested",
        )  # fmt: skip
    raise UserError(
        f"model_type {kind!r} needs code that comes with the checkpoint, which is never run here", path=model.name,
        key="model.name", fix="use a checkpoint with a native network; `ft models list` shows what is tested",
    )  # fmt: skip


def text_kind(config: dict[str, Any]) -> str | None:
    """The model_type of the text part of a checkpoint that reads images or sounds, too."""
    part = config.get("text_config")
    return part.get("model_type") if isinstance(part, dict) else None


def network(model: ModelConfig, config: dict[str, Any]) -> Any:
    """config.json as transformers reads it, with `model.rope_scaling`; that of the text part where transformers has no
    language model for the whole (Mistral Small 3.1 and its kin)."""
    with as_user_error(model):
        found = AutoConfig.from_pretrained(
            sources.locate(model), revision=sources.hub_revision(model), trust_remote_code=False
        )
    if config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        tied = getattr(found, "tie_word_embeddings", None)
        found = found.get_text_config()
        found.tie_word_embeddings = found.tie_word_embeddings if tied is None else tied
    rope.apply(found, model.rope_scaling, model.name)
    return found


# Where the text part of a larger model lies in its checkpoint, in files of transformers 4 and 5.
TEXT_PART = {r"^(model\.)?language_model\.model\.": "model.", r"^language_model\.lm_head\.": "lm_head.",
             r"^model\.language_model\.": "model."}  # fmt: skip


def load_weights(model: ModelConfig, network: Any, **options: Any) -> PreTrainedModel:
    config = read_json(sources.config_file(model))
    part = config["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if part:
        options["key_mapping"] = TEXT_PART
    loaded, info = AutoModelForCausalLM.from_pretrained(
        sources.weights(model), config=network, revision=sources.hub_revision(model), trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    if "vision_config" in config or "audio_config" in config:  # what the text part of the checkpoint does without
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not OTHER_SENSES.search(key)]
    check_loading(info, model.name)
    if part:  # stock from here on: what is saved has the names of the text model
        own = [c for c in loaded._weight_conversions if not {*c.source_patterns} & {*TEXT_PART}]
        loaded._weight_conversions = own
    named_as_it_is(loaded)
    return loaded


def named_as_it_is(loaded: Any) -> None:
    """Llama4ForCausalLM says "language_model" and has "model"; trl looks for it under the name that is said."""
    if not hasattr(loaded, loaded.base_model_prefix) and hasattr(loaded, "model"):
        loaded.base_model_prefix = "model"
