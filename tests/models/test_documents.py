"""Rows side by side in one, without padding: the same loss and gradients as with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.models import documents

ROWS = [[*range(3, 20)], [40, 41], [*range(50, 61)], [70, 71], [80, 81], [90]]
SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **more}))


def padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS])
    return {"input_ids": ids, "attention_mask": mask}


def loss_of(logits: list[torch.Tensor]) -> torch.Tensor:
    """Of the rows' own logits."""
    pairs = [(found[:-1], torch.tensor(row[1:])) for found, row in zip(logits, ROWS, strict=True) if len(row) > 1]
    return F.cross_entropy(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]), reduction="sum")


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"attention_bias": True}], ids=str)
def test_one_row_has_the_loss_and_gradients_of_padded_rows(more: dict[str, Any]) -> None:
    model = llama(**more)
    plain = loss_of([logits[: len(row)] for logits, row in zip(model(**padded()).logits, ROWS, strict=True)])
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert documents.use(model)
    assert model.config._attn_implementation == documents.NAME
    together = model(
        input_ids=torch.tensor([[token for row in ROWS for token in row]]),
        position_ids=torch.cat([torch.arange(len(r)) for r in ROWS])[None],
    ).logits[0]
    found = loss_of(list(together.split([len(row) for row in ROWS])))
    found.backward()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max()))


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}], ids=str)
def test_two_documents_share_their_beginning(more: dict[str, Any]) -> None:
    """Computed once for both, with the logits and gradients of two whole rows."""
    model = llama(**more)
    one, other, next_one = [3, 4, 5, 6, 10, 11, 12], [3, 4, 5, 6, 20, 21], [30, 31]
    alone = [model(input_ids=torch.tensor([ids])).logits[0] for ids in (one, other, next_one)]
    plain = sum((logits[-3:] ** 2).sum() for logits in alone)
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert documents.use(model)
    positions = [*range(7), 3, 4, 5, 0, 1]
    logits = model(input_ids=torch.tensor([one + other[3:] + next_one]), position_ids=torch.tensor([positions])).logits[
        0
    ]
    for found, expected in zip(logits.split([7, 3, 2]), alone, strict=True):
        torch.testing.assert_close(found, expected[-len(found) :], rtol=1e-5, atol=1e-5)
    sum((part[-3:] ** 2).sum() for part in logits.split([7, 3, 2])).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-5 * float(wanted[name].abs().max()))


def test_padded_rows_and_generation_are_as_they_were() -> None:
    """What has a mask or a cache goes the old way."""
    model = llama().eval()
    left = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    plain, written = model(**padded()).logits, model.generate(**left, **options)
    assert documents.use(model)
    torch.testing.assert_close(model(**padded()).logits, plain, rtol=0, atol=0)
    assert model.generate(**left, **options).tolist() == written.tolist()


def test_the_config_that_is_saved_says_nothing_of_it() -> None:
    model = llama()
    assert documents.use(model)
    assert documents.NAME not in model.config.to_json_string()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"model_type": "bloom", "n_layer": 2, "n_head": 4},  # tells positions by a bias that runs on over the row
    ],
    ids=lambda config: config["model_type"],
)
def test_a_network_that_computes_otherwise_then_keeps_its_own(config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SHAPE, **config}))
    before = model.config._attn_implementation
    assert not documents.use(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("longest", [64, 4])
def test_positions_that_turn_by_the_width_of_a_row_keep_it(longest: int) -> None:
    """Dynamic NTK, of which texts of the original length show nothing."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not documents.use(llama(max_position_embeddings=longest, rope_parameters=rope))
    assert documents.use(llama(max_position_embeddings=longest, rope_parameters={**rope, "rope_type": "linear"}))


def test_an_adapter_that_begins_at_a_mark_keeps_rows_and_is_not_packed() -> None:
    """aLoRA works behind the last of its marks in a row: of several texts there, in the last one only. A fresh one
    computes nothing, and one without its marks neither, so that trying shows no difference."""
    from peft import LoraConfig, get_peft_model

    from finetune.training.packing import documents_isolated

    for marks, apart in ((None, True), ([77, 78], False)):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=marks)
        model = get_peft_model(llama(vocab_size=300), config)
        assert documents_isolated(model, [*range(3, 35)]) is apart
        assert documents.use(model) is apart


def test_virtual_tokens_keep_their_rows_apart() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert not documents.use(model)
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_attention_that_shows_documents_to_each_other_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "documents", lambda *_: None)
    model = llama()
    assert not documents.use(model)
    assert model.config._attn_implementation == "sdpa"
