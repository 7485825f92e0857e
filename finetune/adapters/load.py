"""A model with its adapter: fresh, loaded to go on, saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType, get_peft_model
from peft.tuners.ln_tuning.layer import LNTuningLayer
from transformers import PreTrainedModel

from finetune.adapters import lora_init, soft_prompts
from finetune.adapters.methods import METHODS, active, of
from finetune.adapters.targets import linear_names, towers
from finetune.errors import UserError
from finetune.models.weight_files import read_json
from finetune.recipe.adapters import Adapter
from finetune.recipe.stages import Recipe


def as_score_task(config: PeftConfig) -> PeftConfig:
    """The same adapter on a model with a score head, which is trained and saved with it."""
    config.task_type = TaskType.SEQ_CLS
    return config


def apply(
    model: PreTrainedModel, section: Adapter, tokenizer: Any = None, folder: Path | None = None,
    adjust: Callable[[PeftConfig], PeftConfig] = lambda config: config, draw: bool = True,
) -> Any:  # fmt: skip
    """`model` with a fresh adapter.

    UserError when the targets match nothing, listing what there is.

    Args:
        tokenizer: for soft prompts that start from text; folder: the base's own weights, for loftq.
        adjust: last word on peft's config; draw: give it the start values that the section asks for.
    """
    method = METHODS[section.method]
    if method.make_config is None:
        model.requires_grad_(True)
        for name in towers(model):
            model.get_submodule(name).requires_grad_(False)
        return model
    try:
        adapted = get_peft_model(model, adjust(method.make_config(model, section)))
    except ValueError as error:
        raise UserError(str(error).splitlines()[0], key="adapter", fix=f"modules: {linear_names(model)}") from None
    if method.initialise is not None and draw:
        method.initialise(adapted, section, tokenizer, folder)
    prepare(adapted)
    return adapted


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Dtype in which the base is held: that of the computation, but float32 where all of it is trained."""
    return torch.float32 if recipe.adapter.method == "full" else getattr(torch, recipe.model.dtype)


def adapter_config(folder: Path) -> dict[str, Any]:
    """peft's own description of a saved adapter."""
    return read_json(folder / "adapter_config.json")


def loads_trainable(folder: Path) -> bool:
    """Whether `PeftModel.from_pretrained(…, is_trainable=True)` continues from the adapter in `folder`.

    Not from a soft prompt: peft would put the finished embeddings into a fresh network. `prepare` makes them trainable.
    """
    return of(adapter_config(folder)["peft_type"]).virtual_tokens is None


def prepare(adapted: Any) -> None:
    """What a fresh or a loaded adapter needs before training."""
    soft_prompts.prepare(adapted, active(adapted).virtual_tokens)
    for module in adapted.modules():
        if isinstance(module, LNTuningLayer):  # its float32 weights make float32 of what comes in as bfloat16
            module.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))
    # By default peft asks the hub whether the vocabulary has grown, and for ChatGLM's layout (`padded_vocab_size`)
    # wrongly saves the embeddings into every adapter. Only an adapter that came with its own keeps them.
    keep = getattr(adapted, "holds_embeddings", False)
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=keep)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # fp16 gradients cannot be unscaled; bf16 updates round away
            parameter.data = parameter.data.float()


def save(model: Any, folder: Path) -> None:
    """The adapter in PEFT's format; starts that rewrote the base become plain LoRA for the base as it was."""
    model.save_pretrained(folder, selected_adapters=[model.active_adapter])  # no other role's of PPO
    lora_init.plain_lora(model, folder)
