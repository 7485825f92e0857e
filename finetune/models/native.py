"""Bases as transformers writes them: network and weights come through its own classes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.errors import UserError
from finetune.models import rope, sources
from finetune.models.failures import as_user_error
from finetune.models.weight_files import check_loading
from finetune.recipe.sections import ModelConfig


def check(model: ModelConfig, config: dict[str, Any]) -> None:
    """UserError unless transformers has a network that continues text for this config.json."""
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"model_type {kind!r} is no name", path=model.name, key="model.name", fix=sources.HUB_HELP)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
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


def network(model: ModelConfig, config: dict[str, Any]) -> Any:
    """config.json as transformers reads it, with `model.rope_scaling`."""
    with as_user_error(model):
        found = AutoConfig.from_pretrained(
            sources.locate(model), revision=sources.hub_revision(model), trust_remote_code=False
        )
    rope.apply(found, model.rope_scaling, model.name)
    return found


def load_weights(model: ModelConfig, network: Any, **options: Any) -> PreTrainedModel:
    loaded, info = AutoModelForCausalLM.from_pretrained(
        sources.weights(model), config=network, revision=sources.hub_revision(model), trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    check_loading(info, model.name)
    return loaded
