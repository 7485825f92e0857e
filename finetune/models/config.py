"""config.json of a base, and whether it can be loaded here.

read_config(model)          config.json as a dict; what cannot be loaded is refused here, with the reason
network(model, config)      the native network that it describes, as transformers' config
embedding_rows(config)      how many ids the model knows
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune.errors import UserError
from finetune.models import baichuan, rope, sources
from finetune.models.chatglm.config import glm_config, is_chatglm_layout
from finetune.models.failures import as_user_error
from finetune.models.sources import HUB_HELP
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig


def read_config(model: ModelConfig) -> dict[str, Any]:
    """config.json. UserError, before anything else is fetched, when the model cannot be loaded."""
    path = sources.file(model, "config.json")
    if path is None:
        raise UserError("has no config.json", path=model.name, key="model.name", fix=HUB_HELP)
    config = read_json(Path(path))
    check_config(config, model)
    return config


def check_config(config: dict[str, Any], model: ModelConfig) -> None:
    """UserError unless a native network exists for this config.json."""
    sources.check_family(config, model.name)
    if is_chatglm_layout(config):
        glm_config(config, model.name, rope.glm_reading(model.rope_scaling, config))
        return
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"model_type {kind!r} is no name", path=model.name, key="model.name", fix=HUB_HELP)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or baichuan.is_fused_layout(config):
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
    """The native network of a config.json, as transformers' config, with `model.rope_scaling` in it."""
    if is_chatglm_layout(config):
        reading = rope.glm_reading(model.rope_scaling, config)
        found: Any = glm_config(config, model.name, reading)
        if reading is not None:
            return found
    elif baichuan.is_fused_layout(config):
        found = baichuan.llama_config(config, model.name)
    else:
        revision = sources.hub_revision(model)
        with as_user_error(model):
            found = AutoConfig.from_pretrained(sources.locate(model), revision=revision, trust_remote_code=False)
    rope.apply(found, model.rope_scaling, model.name)
    return found


def embedding_rows(config: dict[str, Any]) -> int | None:
    """How many ids the model knows, by its config.json."""
    parts = [config, config.get("text_config") or {}]
    return next((part[key] for part in parts for key in ("padded_vocab_size", "vocab_size") if part.get(key)), None)
