"""How a base lies on disk, and how it becomes one of transformers' own networks: one row per layout.

A family names its layout in families.py, and whoever reads a base asks the row: config, tokenizers, loading, attach.
Weights are renamed and split while they are read; nothing is converted on disk, and a checkpoint's own code is never
run. Writing a layout back is an export format: export.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.families import family
from finetune.models import baichuan, native
from finetune.models.chatglm.adapter import adapter_for_glm
from finetune.models.chatglm.config import glm_network
from finetune.models.chatglm.tokenizer import load_original_tokenizer
from finetune.models.chatglm.weights import load_original_weights
from finetune.recipe.sections import ModelConfig

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    network: Callable[[ModelConfig, Config], Any]
    """Of (model, its config.json): the native network as transformers' config, with `model.rope_scaling` in it.
    UserError for what that network cannot express."""
    weights: Callable[..., Any]
    """Of (model, that network, **options of from_pretrained): the stock network with its weights. UserError for
    weights that are missing, left over or misshapen."""
    check: Callable[[ModelConfig, Config], Any] | None = None
    """What is said of config.json before anything else is fetched; None where `network` says it."""
    tokenizer: Callable[[ModelConfig], Any] | None = None
    """The only tokenizer the base can have, which neither a chat template nor an adapter changes."""
    adapter: Callable[[Path, Config], tuple[Any, dict[str, Tensor]] | None] = lambda folder, config: None
    """An adapter made for the layout's own names, as (peft's config, weights) for the native network; None for one
    that fits that already."""


LAYOUTS: dict[str, Layout] = {
    "": Layout(native.network, native.load_weights, check=native.check),
    "baichuan": Layout(baichuan.network, baichuan.load_weights),
    "chatglm": Layout(glm_network, load_original_weights, tokenizer=load_original_tokenizer, adapter=adapter_for_glm),
}


def layout_of(config: Config) -> Layout:
    """The layout of the base with this config.json."""
    return LAYOUTS[family(str(config.get("model_type"))).layout]
