"""Soft prompts: learned embeddings (prompt tuning, P-tuning) or keys and values (prefix tuning) before the text.

A saved soft prompt is what the network made: peft loads it without any network, in every tool.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from finetune.errors import UserError
from finetune.recipe.adapters import PrefixTuningAdapter, PromptTuningAdapter, PTuningAdapter

SoftPrompt = PromptTuningAdapter | PTuningAdapter | PrefixTuningAdapter


def token_ids(section: SoftPrompt, kind: str, text: str | None, tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """num_virtual_tokens ids to start from: of the text, repeated or cut, or drawn at random."""
    wanted = section.num_virtual_tokens
    if kind == "vocabulary":
        special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        ids = [i for i in torch.randperm(vocabulary).tolist() if i not in special][:wanted]
        return torch.tensor(ids * -(-wanted // len(ids)))[:wanted]
    if tokenizer is None:
        raise UserError("a text to start from needs a tokenizer", key="adapter", fix="start from vocabulary or random")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("the text to start from is empty", key="adapter", fix="give some words")
    return torch.tensor((ids * -(-wanted // len(ids)))[:wanted])


@torch.no_grad()
def initialise(model: Any, section: SoftPrompt, tokenizer: Any = None) -> None:
    """Start values. peft draws from N(0, 1), dozens of times wider than the embeddings of any language model."""
    encoder = model.prompt_encoder["default"]
    base = model.get_base_model()
    embeddings = base.get_input_embeddings()
    if isinstance(section, PromptTuningAdapter):
        if section.prompt_tuning_init == "random":
            encoder.embedding.weight.normal_(std=embeddings.weight.float().std().item())
        else:
            kind, text = section.prompt_tuning_init, section.prompt_tuning_init_text
            ids = token_ids(section, kind, text, tokenizer, embeddings.num_embeddings)
            encoder.embedding.weight.copy_(embeddings(ids.to(embeddings.weight.device)))
    elif isinstance(section, PrefixTuningAdapter) and not section.prefix_projection and section.prefix_init != "random":
        ids = token_ids(section, section.prefix_init, section.prefix_init_text, tokenizer, embeddings.num_embeddings)
        encoder.embedding.weight.copy_(keys_and_values(base, ids))


def keys_and_values(base: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the base caches for these tokens, as a row per token: Li and Liang, section 4.3, start from real words."""
    was_training = base.training
    base.eval()
    cache = DynamicCache()
    base(input_ids=ids[None].to(base.device), past_key_values=cache, use_cache=True)
    base.train(was_training)
    rows = [state[0].transpose(0, 1).flatten(1) for keys, values, _ in cache for state in (keys, values)]
    return torch.cat(rows, dim=1).float()


class ReadOnlyPrefix(DynamicCache):
    """A cache that puts the prefix before the new keys and values and keeps nothing.

    Training reads the cache once per forward pass, and under gradient checkpointing twice: peft's cache would grow on
    the second pass, and transformers therefore takes it away, prefix and all (huggingface/peft#869, refused since
    huggingface/peft#2191).
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


def prepare(model: Any, where: str | None) -> None:
    """Let a loaded prompt be trained on, and prefix tuning under gradient checkpointing.

    where: the method's `virtual_tokens`.
    """
    if where is not None:
        model.prompt_encoder.requires_grad_(True)
    if where != "cache":
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._can_checkpoint_with_cache = True  # the cache is only read, so nothing is lost on the second pass
    make = type(model).get_prompt

    def get_prompt(batch_size: int, *args: Any, **kwargs: Any) -> Any:
        prompt = make(model, batch_size, *args, **kwargs)
        if model.training and isinstance(prompt, DynamicCache):
            prompt.__class__ = ReadOnlyPrefix
        return prompt

    model.get_prompt = get_prompt
