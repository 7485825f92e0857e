"""The base of a model that is new: its config and the tokenizer that it gets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.base import Base
from finetune.builtin import tokenizers, world
from finetune.data import text
from finetune.errors import UserError
from finetune.models.chatglm import tokenizer as chatglm_tokenizer
from finetune.models.tokenizers import load_tokenizer
from finetune.recipe.sections import ModelConfig, PretrainModelConfig
from finetune.terminal.progress import task

WORLD_CHATGLM3 = "builtin:world/chatglm3"  # model.tokenizer: the world's tokenizer as a ChatGLM3 tokenizer.model


def open_base(model: PretrainModelConfig) -> Base:
    """The base, or for a new model its config and the tokenizer that it gets."""
    return Base.open(model) if model.config is None else Base(model, model.config, own_tokenizer=tokenizer_of(model))


def tokenizer_of(model: PretrainModelConfig) -> Any:
    """Of a new model."""
    name = model.tokenizer
    if name is None:
        fix = f"give a folder, a hub id or {text.WORLD}"
        raise UserError("is needed with model.config", key="model.tokenizer", fix=fix)
    if name == text.WORLD:
        with task("making the tokenizer", after=1.0):
            return tokenizers.build_tokenizer(world_texts(), world.HAN)
    if name == WORLD_CHATGLM3:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes(tokenizers.build_sentencepiece(world_texts(), world.HAN))
            return chatglm_tokenizer.build_tokenizer(folder, version=3)
    return load_tokenizer(ModelConfig(name=name, chat_template=model.chat_template))


def world_texts() -> Iterator[str]:
    return islice(world.documents(0, 8_000), 8_000)
