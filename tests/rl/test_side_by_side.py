"""PPO's passes in one row without padding: every reading and every gradient is that of padded rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.adapters.load import apply
from finetune.models import documents
from finetune.recipe.adapters import ADAPTERS
from finetune.rl.models import no_dropout
from finetune.rl.replies import Replies, Sampling, end_scores, log_probs, response_logits, together, token_values

PROMPTS = [[40, 50, 60, 70, 80], [90], [33, 44, 55]]
REPLIES = [[7, 8, 2], [9, 10, 11, 12], [2]]


def readings(model: Any, replies: Replies) -> dict[str, Any]:
    """What is read off the replies, and the gradients of a loss of all of it."""
    torch.manual_seed(1)
    head, sampling = torch.nn.Linear(64, 1), Sampling(temperature=0.7, max_new_tokens=8)
    mask = replies.mask
    logits = response_logits(model, replies)
    found = {
        "logits": logits * mask[..., None], "log_probs": log_probs(logits, replies.tokens, sampling) * mask,
        "values": token_values(model, head, replies) * mask, "scores": end_scores(model, head, replies),
    }  # fmt: skip
    model.zero_grad()
    (found["log_probs"].sum() + (found["values"] ** 2).sum() + (found["scores"] ** 2).sum()).backward()
    told = {name: value.detach() for name, value in found.items()}
    return {**told, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1], [1]], ids=str)
def test_readings_and_gradients_are_those_of_padded_rows(base: Path, rows: list[int]) -> None:
    torch.manual_seed(3)
    model = apply(AutoModelForCausalLM.from_pretrained(base), ADAPTERS["lora"]()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    replies = together(PROMPTS, REPLIES, [2], 0, "cpu").rows(torch.tensor(rows))
    wanted = readings(model, replies)
    assert documents.use(model)
    found = readings(model, replies)
    assert found.keys() == wanted.keys()
    assert len(wanted) > 4
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_no_position_is_padding(base: Path) -> None:
    """13 tokens and 3 that fill up to 8s; a reply's last token, of which nothing is read, only where it is scored."""
    replies = together(PROMPTS, REPLIES, [2], 0, "cpu")
    inputs, at = replies.side_by_side(last=False)
    assert inputs["input_ids"].tolist() == [[40, 50, 60, 70, 80, 7, 8, 90, 9, 10, 11, 33, 44, 55, 0, 0]]
    assert inputs["position_ids"].tolist() == [[*range(7), *range(4), *range(3), 0, 0]]
    read = torch.where(replies.mask.bool(), inputs["input_ids"][0][at], -1)
    assert read.tolist() == [[80, 7, 8, -1], [90, 9, 10, 11], [55, -1, -1, -1]]
    assert replies.side_by_side(last=True)[0]["input_ids"].shape == (1, 24)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("mixtral", {"router_jitter_noise": 0.1}), ("gpt2", {"embd_pdrop": 0.1}), ("opt", {"layerdrop": 0.5})],
)
def test_passes_of_an_unchanged_policy_are_equal(kind: str, more: dict[str, Any]) -> None:
    """Whatever its config says of dropout, of layers that are left out and of noise on what chooses experts."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=96, **shape, **more)).train()
    no_dropout(network)
    ids = torch.arange(3, 40)[None]
    one, *others = (network(input_ids=ids, use_cache=False).logits for _ in range(4))
    assert all(torch.equal(one, other) for other in others)
