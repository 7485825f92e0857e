"""Where a network's shape is known from: config.json, a GGUF file's header, or the facts that come with ft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.models import loading, sources
from finetune.models.gguf import cache
from finetune.models.tokenizers import load_tokenizer
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig

SHIPPED = Path(__file__).parent / "configs"
"""config.json of the models that shipped recipes name, as far as it says how the network is built."""


MADE_FOR = {"builtin:world": "tiny-llama", "builtin:world/chatglm3": "tiny-chatglm3"}


def skeleton(model: ModelConfig) -> Any:
    """The network without weights. Nothing is downloaded but config.json, where it is neither here nor shipped."""
    if model.is_new:
        # Ids are the tokenizer's, and of no size; those that a config class has may lie outside of this vocabulary.
        config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **model.config}  # type: ignore[attr-defined]
        if "vocab_size" not in config:
            config["vocab_size"] = vocabulary(str(model.tokenizer))  # type: ignore[attr-defined]
        with torch.device("meta"):
            return loading.new_model(config, torch.float32)
    folder = shipped(model)
    if folder is not None:
        model = model.model_copy(update={"name": str(folder), "source": "local", "revision": None})
    elif is_unconverted(model):
        from finetune.models.gguf.conversion import config_of
        from finetune.models.gguf.header import read_header

        cache.check(sources.gguf_base(model))
        return loading.of_config(config_of(read_header(sources.gguf_base(model))), model)
    return loading.skeleton(model, with_weights=False)


def vocabulary(tokenizer: str) -> int:
    """Tokens of a new model, which are its tokenizer's; one that training makes is that of a built-in base."""
    if tokenizer in MADE_FOR:
        return int(read_json(sources.BUILTIN_MODELS / MADE_FOR[tokenizer] / "config.json")["vocab_size"])
    return len(load_tokenizer(ModelConfig(name=tokenizer)))


def is_unconverted(model: ModelConfig) -> bool:
    """Whether the base is a GGUF file that would first be converted: gigabytes in the cache."""
    return sources.is_gguf_base(model) and not cache.complete(cache.folder_of(sources.gguf_base(model)))


def shipped(model: ModelConfig) -> Path | None:
    """The folder with the config.json of a model that is not in a folder of that name here."""
    folder = SHIPPED / model.name.replace("/", "--")
    here = Path(model.name).expanduser().exists() or model.gguf_file is not None or "/" not in model.name
    return folder if not here and folder.is_dir() else None
