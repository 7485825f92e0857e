"""A score head on a causal model: what reward models are.

The network comes through the one door of `loading`, quantized or from ChatGLM's layout; only the head is new. Saved
with an adapter, any tool loads it: AutoModelForSequenceClassification(num_labels=1) and peft.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from finetune.errors import UserError
from finetune.models.documents import documents

HEAD = "score"
# What transformers notes on a loaded model, and trainers ask for.
LOADED = (
    "is_quantized", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_device_map",
    "_tp_size", "_device_mesh", "_is_distributed_loading_by_transformers",
)  # fmt: skip


def last_real(mask: torch.Tensor) -> torch.Tensor:
    """Position of each row's last 1, of which there must be one. [rows, length] -> [rows]."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask * (positions + 1)).argmax(dim=1)


class ScoredAtLastToken:
    """Mixed in before a network of transformers: the score of a row is read at its last real token.

    transformers finds that token by comparing ids with the padding, and with virtual tokens (embeddings instead of
    ids) takes the last position, padded or not. The attention mask knows it always.
    """

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, use_cache: Any = None, **_: Any,
    ) -> SequenceClassifierOutputWithPast:  # fmt: skip
        network = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        passed = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds,
        }  # fmt: skip
        given = {name: value for name, value in passed.items() if value is not None}
        hidden = network(**given, use_cache=bool(past_key_values is not None)).last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        last = rows.new_full((len(rows),), hidden.shape[1] - 1)
        several = None if attention_mask is not None else documents(position_ids, *hidden.shape[:2])
        if several is not None:  # side by side, without padding: a score of each
            last = torch.tensor([length for length, _ in several], device=hidden.device).cumsum(0) - 1
            rows, hidden = torch.zeros_like(last), hidden.flatten(0, 1)[None]
        elif attention_mask is not None:
            last = last_real(attention_mask[:, -hidden.shape[1] :].long())
        ends = hidden[rows, last]
        head: nn.Module = self.score  # type: ignore[attr-defined]
        with torch.autocast(ends.device.type, enabled=False):  # one product per row: no reason to round it
            logits = head(ends.to(next(head.parameters()).dtype))
        return SequenceClassifierOutputWithPast(logits=logits)


def with_score_head(model: PreTrainedModel, name: str) -> Any:
    """A reward model over the network of `model`, which it shares; the head is drawn from N(0, 1 / (hidden + 1)).

    That start keeps first scores near zero (Stiennon et al. 2020, arXiv:2009.01325). UserError for architectures
    without such a network in transformers.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    stock: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if stock is None:
        raise UserError(
            f"{config.model_type} has no network with a score head in transformers", path=name, key="model.name",
            fix="use another base for the reward model",
        )  # fmt: skip
    # The class keeps its stock name: config.json of a fully trained reward model says it.
    scored = type(stock.__name__, (ScoredAtLastToken, stock), {"__module__": stock.__module__})  # whose source is read
    with torch.device("meta"):
        shell = scored(config)
    setattr(shell, shell.base_model_prefix, getattr(model, model.base_model_prefix))
    embeddings = model.get_input_embeddings().weight
    head = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, device=embeddings.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    setattr(shell, HEAD, head)
    for key in LOADED:
        if hasattr(model, key):
            setattr(shell, key, getattr(model, key))
    return shell.train(model.training)
