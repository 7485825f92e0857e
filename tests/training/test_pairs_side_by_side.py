"""Rows of a pass in one, prompts of pairs once: the same log-probabilities, scores and gradients as of padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.models import documents
from finetune.models.score_head import with_score_head
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import SftRecipe
from finetune.training.loss_parts import score_trained_positions
from finetune.training.preference import PairCollator
from finetune.training.side_by_side import allow, draws, scored, unpadded

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
    assert unpadded(network, network) is network, "as long as it does not attend document by document"
    wanted = measured(network, network)
    assert documents.use(network)
    lengths: list[int] = []
    hook = network.model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = measured(network, unpadded(network, network, share))
    hook.remove()
    assert lengths == [26 - 3 if share else 26], "three of four tokens of one prompt; the last ones predict"
    for name, value in wanted.items():
        if value.dtype == torch.bool:
            assert torch.equal(found[name], value), name
        else:
            limit = 1e-5 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=limit, msg=name)


def test_rows_that_are_no_pairs_keep_their_order() -> None:
    """As those of KTO: any number of them."""
    network = model()
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 10, 11, 0]])
    mask = (ids != 0).long()
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    wanted = network(**given, fused_lm_head=True).log_probs
    assert documents.use(network)
    found = unpadded(network, network)(**given, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_scores_and_gradients_are_those_of_padded_rows(kind: str) -> None:
    """Of a reward model: one score of each row, read at its last token."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=96, intermediate_size=48, **shape)
    torch.manual_seed(0)
    network = with_score_head(AutoModelForCausalLM.from_config(config), kind)
    batch = PairCollator(0)(ROWS)
    del batch["completion_mask"]

    def read(call: Any) -> dict[str, torch.Tensor]:
        network.zero_grad()
        scores = call(**batch, use_cache=False).logits
        (scores[:, 0] * torch.arange(1, 7)).sum().backward()
        grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        return {"": scores.detach(), **grads}

    assert scored(network, network) is network
    wanted = read(network)
    assert documents.use(network)
    found = read(scored(network, network))
    assert found[""].shape == (6, 1)
    for name, value in wanted.items():
        limit = 1e-5 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=limit, msg=name)


@pytest.mark.parametrize(
    ("kind", "more", "drawn"),
    [
        ("llama", {}, False),
        ("llama", {"attention_dropout": 0.1}, True),
        ("gpt2", {"resid_pdrop": 0.1}, True),
        ("opt", {"dropout": 0.1, "ffn_dim": 48}, True),  # a function, no module
        ("mixtral", {"router_jitter_noise": 0.1}, True),  # no dropout
    ],
)
def test_whether_a_pass_draws_is_found_by_trying(kind: str, more: dict[str, Any], drawn: bool) -> None:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "num_key_value_heads": 2}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=96, **{**shape, **off, **more})
    network = AutoModelForCausalLM.from_config(config).eval()
    network.get_output_embeddings().train()
    before = torch.get_rng_state()
    assert draws(network) is drawn
    assert torch.equal(torch.get_rng_state(), before), "other numbers would be drawn from here on"
    assert [module for module in network.modules() if module.training] == [network.get_output_embeddings()]


@pytest.mark.parametrize(("train", "used"), [({}, True), ({"neftune_noise_alpha": 5.0}, False)], ids=str)
def test_noise_on_embeddings_keeps_rows_apart(train: dict[str, Any], used: bool) -> None:
    """NEFTune's is alpha / sqrt(length x width): of all rows in one it would be the less the more rows there are."""
    recipe = {"version": 1, "stage": "sft", "model": {"name": "m"}, "data": {"train": "d"}, "output": {"dir": "o"}}
    network = model()
    allow(network, SftRecipe.model_validate({**recipe, "train": train}), Hardware())
    assert documents.used(network) is used
