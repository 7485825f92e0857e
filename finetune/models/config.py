"""config.json of a base, and whether it can be loaded here."""

from __future__ import annotations

from typing import Any

from finetune.models import sources
from finetune.models.layouts import layout_of
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig


def read_config(model: ModelConfig) -> dict[str, Any]:
    """config.json. UserError, before anything else is fetched, when no native network exists for it."""
    config = read_json(sources.config_file(model))
    sources.check_family(config, model.name)
    layout = layout_of(config)
    (layout.check or layout.network)(model, config)
    return config


def embedding_rows(config: dict[str, Any]) -> int | None:
    """How many ids the model knows, by its config.json."""
    parts = [config, config.get("text_config") or {}]
    return next((part[key] for part in parts for key in ("padded_vocab_size", "vocab_size") if part.get(key)), None)
