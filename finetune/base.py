"""An open base: what is read of a model before its weights are, each once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finetune.data import thinking
from finetune.data.chat import make_encoder
from finetune.data.encoder import Encoder
from finetune.families import Family, family
from finetune.models import attach, loading, sources, tokenizers
from finetune.models.config import read_config
from finetune.models.identity import fingerprint
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import warn


@dataclass(frozen=True)
class Base:
    model: ModelConfig
    config: dict[str, Any]
    """config.json"""
    adapter: Path | None = None
    """Folder of the adapter that is used with it, not trained."""
    own_tokenizer: Any = None
    """Of a new model, which no folder holds."""
    treatment: str | None = None
    """data.thinking; what was trained with it when unset."""

    @classmethod
    def open(cls, model: ModelConfig, adapter: Path | None = None, treatment: str | None = None) -> Base:
        """With the chat template and tokens trained with the adapter. UserError for what cannot be loaded."""
        return cls(model, read_config(model), adapter, treatment=treatment)

    @property
    def family(self) -> Family:
        return family(self.config["model_type"])

    @cached_property
    def folder(self) -> Path:
        """Where its files lie on this machine."""
        return sources.folder(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        if self.own_tokenizer is not None:
            return self.own_tokenizer
        return tokenizers.load_tokenizer(self.model, self.adapter)

    @cached_property
    def encoder(self) -> Encoder:
        """Conversations as ids, in this base's chat format or in that of the adapter."""
        return make_encoder(self.tokenizer, self.family, self.treatment or self.trained.get("data.thinking", "keep"))

    @cached_property
    def trained(self) -> dict[str, Any]:
        """How adapter or model was trained to think, of thinking.record; empty where nothing says so."""
        if self.model.is_new:
            return {}
        start = sources.adapter_folder(self.model.adapter) if self.model.adapter else self.folder
        return thinking.read(self.adapter or start)

    def asking(self, on: bool | None, key: str = "--thinking") -> Encoder:
        """The encoder whose prompts ask for thinking or for none; without a word as was trained. UserError, for `key`,
        where the template has no switch."""
        if on is None and self.encoder.thinking.switch is not None:
            on = thinking.usual(self.trained)
        if said := thinking.mismatch(self.trained, on, self.encoder.thinking):
            warn(said)
        return thinking.asked(self.encoder, on, key)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights; that of a new model is empty."""
        return "" if self.model.is_new else fingerprint(self.folder)

    @cached_property
    def skeleton(self) -> Any:
        """The network without weights."""
        return loading.skeleton(self.model)

    def load(self, dtype: torch.dtype, machine: Hardware) -> Any:
        """The network, in eval mode, with the adapter on it."""
        network = loading.load_model(self.model, dtype, machine)
        return network if self.adapter is None else attach.attach_adapter(network, self.adapter, self.model)
