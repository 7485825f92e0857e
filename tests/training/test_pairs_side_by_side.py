"""Pairs in one row, their prompts once: the same log-probabilities and gradients as of padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.models import documents
from finetune.training.loss_parts import score_trained_positions
from finetune.training.preference import PairCollator
from finetune.training.side_by_side import draws, pairs

ROWS = [
    {"chosen_ids": [3, 4, 5, 6, 10, 11], "chosen_mask": [0, 0, 0, 0, 1, 1],
     "rejected_ids": [3, 4, 5, 6, 20, 21, 22], "rejected_mask": [0, 0, 0, 0, 1, 1, 1]},
    {"chosen_ids": [30, 31, 32], "chosen_mask": [0, 1, 1], "rejected_ids": [30, 31], "rejected_mask": [0, 1]},
    {"chosen_ids": [40, 41, 42, 43], "chosen_mask": [0, 0, 1, 1],  # templates may write prompts otherwise
     "rejected_ids": [40, 51, 52, 43], "rejected_mask": [0, 0, 0, 1]},
]  # fmt: skip


def model(**more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    found = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **shape, **more))
    score_trained_positions()
    add_fused_lm_head(found, outputs=("log_probs", "entropy", "is_top1"))
    return found


def measured(network: Any, call: Any) -> dict[str, torch.Tensor]:
    batch = PairCollator(0)(ROWS)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    network.zero_grad()
    found = call(**batch, labels=labels, use_cache=False, fused_lm_head=True)
    (found.log_probs.sum(1) * torch.arange(1, 7)).sum().backward()
    told = {name: found[name].detach() for name in ("log_probs", "entropy", "is_top1", "label_mask")}
    return {**told, **{name: p.grad.clone() for name, p in network.named_parameters()}}


@pytest.mark.parametrize("share", [True, False])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(share: bool) -> None:
    network = model()
    assert pairs(network, network) is network, "as long as it does not attend document by document"
    wanted = measured(network, network)
    assert documents.use(network)
    lengths: list[int] = []
    hook = network.model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = measured(network, pairs(network, network, share))
    hook.remove()
    assert lengths == [26 - 3 if share else 26], "three of four tokens of one prompt; the last ones predict"
    for name, value in wanted.items():
        if value.dtype == torch.bool:
            assert torch.equal(found[name], value), name
        else:
            limit = 1e-5 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=limit, msg=name)


def test_prompts_are_not_shared_where_activations_are_dropped() -> None:
    network = model(attention_dropout=0.1)
    assert documents.use(network)
    assert draws(network.train())
    assert not draws(network.eval())
    plain = model().train()
    assert not draws(plain)
    plain.model.layers[0].add_module("dropped", torch.nn.Dropout(0.1))
    assert draws(plain)
