"""An adapter on its base."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from finetune import register
from finetune.errors import FinetuneError, UserError
from finetune.models import adapter_files, sources
from finetune.models.adapter_files import check_fit, described, own_embeddings, resize, save_adapter
from finetune.models.config import read_config
from finetune.models.failures import as_user_error, reason
from finetune.models.identity import check_identity
from finetune.models.layouts import layout_of
from finetune.models.loading import skeleton
from finetune.models.quantization import for_experts
from finetune.models.tokenizers import added_tokens
from finetune.models.weight_files import tensors
from finetune.recipe.sections import ModelConfig


def attach_adapter(
    base: PreTrainedModel, adapter: Path, model: ModelConfig, trainable: bool = False,
    adjust: Callable[[Any], Any] | None = None, more: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """`base` with the adapter of a folder on it, after checking that it was trained on this base.

    Args:
        adjust: last word on peft's config, e.g. for an adapter that goes on under a score head.
        more: weights for what the adjusted adapter has and the folder lacks; its own stay.
    """
    from peft import PeftConfig, PeftModel

    register()
    check_identity(adapter, sources.folder(model), model.name)
    config = read_config(model)
    with tempfile.TemporaryDirectory() as scratch, as_adapter_error(adapter, model.name):
        adapter = native(adapter, config, Path(scratch))
        if more:
            weights = dict(tensors(adapter_files.weights(adapter)))
            if adapter != Path(scratch):
                shutil.copy(adapter / "adapter_config.json", scratch)
            adapter = Path(scratch)
            save_file({**more, **weights}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        stored = for_experts(PeftConfig.from_pretrained(str(adapter)), base)
        resize_for(base, adapter, model)
        adapted = PeftModel.from_pretrained(
            base, str(adapter), is_trainable=trainable, config=stored if adjust is None else adjust(stored)
        )
        adapted.holds_embeddings = bool(own_embeddings(adapter))  # they go on being saved with it
        return adapted


def native(adapter: Path, config: dict[str, Any], scratch: Path) -> Path:
    """The folder itself, or one in `scratch` with the same adapter for the native network of an original layout.

    Args:
        config: the base's config.json.
    """
    made = layout_of(config).adapter(adapter, config)
    if made is None:
        return adapter
    save_adapter(*made, scratch)
    return scratch


@contextmanager
def as_adapter_error(adapter: Path, name: str) -> Iterator[None]:
    """What peft says about an adapter that it cannot put on this base, in one line."""
    try:
        with warnings.catch_warnings():
            # Weights that the file lacks would stay what they were drawn as.
            warnings.filterwarnings("error", "Found missing adapter keys")
            # What is said of merging is done in adapters/merge.py.
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
            yield
    except FinetuneError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot be put on {name} ({reason(error)})", path=adapter, key="model.adapter",
            fix="give the base it was trained on, or another adapter",
        ) from error  # fmt: skip


def check_adapter(adapter: Path, model: ModelConfig, trainable: bool = False) -> Any:
    """UserError, before the base is loaded, where the adapter's config and weights have no place on it; otherwise the
    two without weights, or None where that cannot be made.

    Args:
        trainable: refuse what can be used but not trained on.
    """
    stored, config = described(adapter), read_config(model)
    # A score head is no part of this network.
    if layout_of(config).adapter(adapter, config) is not None or stored.get("task_type") == "SEQ_CLS":
        return None
    network = skeleton(model)
    with as_user_error(model):
        resize_for(network, adapter, model)
    adapted = check_fit(network, adapter, model.name)
    if trainable and adapted is not None:
        head = adapted.get_output_embeddings()
        if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
            raise UserError(
                "works on the output head (or on embeddings tied to it), and log-probabilities are computed in "
                "training from the head's own weight: it would not be trained", path=adapter, key="model.adapter",
                fix="merge it first (ft merge) and train a new adapter on the result",
            )  # fmt: skip
    return adapted


def resize_for(network: Any, adapter: Path, model: ModelConfig) -> None:
    """Give the base `model` as many embeddings as the adapter was trained on."""
    if layout_of(read_config(model)).tokenizer is None:
        resize(network, adapter, added_tokens(model, adapter))
