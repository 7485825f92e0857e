"""The loss of trained positions alone is the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.trainer import utils

from finetune.training.loss_parts import score_trained_positions

LABELS = torch.tensor([[-100, -100, 7, 8, -100, 9, 3, 2], [-100, 5, -100, -100, -100, -100, -100, -100]])


def step(tied: bool, labels: torch.Tensor, scored: list[int]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Outputs and gradients of a small model with trl's head; `scored` gets the number of rows that go through it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    kernel = utils._ChunkedLogProbFunction
    counted = type("Counted", (), {"apply": lambda rows, *more: scored.append(len(rows)) or kernel.apply(rows, *more)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", counted)
        outputs = model(input_ids=LABELS.clamp(min=1), labels=labels, fused_lm_head=True)
        outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_only_trained_positions_are_scored(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    monkeypatch.setattr(utils, "_use_triton", lambda device: False)
    plain, before = step(tied, LABELS, scored)
    score_trained_positions()
    alone, after = step(tied, LABELS, scored)
    assert scored == [2 * 7, 6]
    for name in ("loss", "log_probs", "entropy", "is_top1"):
        torch.testing.assert_close(alone[name], plain[name], rtol=1e-5, atol=1e-6)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_pass_without_a_trained_position_is_a_zero_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    score_trained_positions()
    outputs, gradients = step(False, torch.full_like(LABELS, -100), scored := [])
    assert scored == [0]
    assert outputs.loss.item() == 0
    assert not any(g.any() for g in gradients.values())
