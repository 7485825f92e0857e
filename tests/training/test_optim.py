"""Which parameters an optimizer gets, at which rate: muon and its AdamW, LoRA+, weight decay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.recipe.sections import TrainConfig
from finetune.training.optim import MuonWithAdamW, decayed, faster_b, muon_split, scheduler_kwargs

TRAIN = TrainConfig(
    optim="muon", learning_rate=0.02, muon_adamw_learning_rate=0.003, muon_momentum=0.9, weight_decay=0.1,
    adam_beta1=0.8, adam_beta2=0.95,
)  # fmt: skip
BLOCK = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
}  # fmt: skip


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Tied or not, a head is no matrix of the blocks; here it is one of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def names_of(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def test_muon_takes_the_matrices_of_the_blocks(model: LlamaForCausalLM) -> None:
    frozen = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    matrices, others = muon_split(model)
    expected = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in BLOCK} - {frozen}
    assert names_of(model, matrices) == expected
    rest = {name for name, _ in model.named_parameters()} - expected - {frozen}
    assert names_of(model, others) == rest
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} < rest
    assert "model.layers.0.self_attn.q_proj.bias" in rest


def test_muon_takes_loras_matrices() -> None:
    """Not the vectors beside them, whatever their shape."""
    module = torch.nn.ParameterDict(
        {
            "lora_A": torch.nn.Parameter(torch.ones(2, 4)), "lora_B": torch.nn.Parameter(torch.ones(4, 2)),
            "ia3_l": torch.nn.Parameter(torch.ones(4, 1)), "stack": torch.nn.Parameter(torch.ones(2, 2, 2)),
        }
    )  # fmt: skip
    matrices, others = muon_split(module)
    assert (names_of(module, matrices), names_of(module, others)) == ({"lora_A", "lora_B"}, {"ia3_l", "stack"})


def stepped(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], count: int = 2) -> None:
    """Some steps whose gradients are the parameters' own, and one more."""
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = parameter.detach() + 1
        optimizer.step()


def test_a_step_is_that_of_muon_and_of_adamw(model: LlamaForCausalLM) -> None:
    """torch's own, each on its part: rates, momentum, betas, and no decay beside the matrices."""
    plain = copy.deepcopy(model)
    stepped(MuonWithAdamW(*muon_split(model), TRAIN), list(model.parameters()))
    matrices, others = muon_split(plain)
    stepped(torch.optim.Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1), matrices)
    stepped(torch.optim.AdamW(others, lr=0.003, betas=(0.8, 0.95), weight_decay=0.0), others)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_muon_goes_on_from_its_state(model: LlamaForCausalLM) -> None:
    """Momentum of either part, and the rates of a schedule."""
    first = MuonWithAdamW(*muon_split(model), TRAIN)
    stepped(first, list(model.parameters()))
    again = copy.deepcopy(model)
    second = MuonWithAdamW(*muon_split(again), TRAIN.model_copy(update={"learning_rate": 1.0}))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [0.02, 0.003]
    for optimizer, one in ((first, model), (second, again)):
        for group in optimizer.param_groups:
            group["lr"] /= 2  # as a schedule does: the parts see it
        stepped(optimizer, list(one.parameters()), 1)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["lora_B", "lora_embedding_B"])
def test_loraplus_is_for_b_alone(kind: str) -> None:
    a = torch.nn.Parameter(torch.ones(2, 4))
    b = torch.nn.Parameter(torch.ones(4, 2))
    module: Any = torch.nn.Module()
    module.layer = torch.nn.ModuleDict(
        {
            "lora_A": torch.nn.ParameterDict({"default": a}),
            kind: torch.nn.ParameterDict({"default": b}),
        }
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    faster_b(optimizer, module, 8.0)
    assert [(group["params"], group["lr"]) for group in optimizer.param_groups] == [([a], 0.1), ([b], 0.8)]


def test_decay_is_for_matrices(model: LlamaForCausalLM) -> None:
    """A bias or a scale may be written as a matrix, and is none."""
    decays = {name for name in decayed(model) if "layers.0" in name}
    assert decays == {f"model.layers.0.{name}.weight" for name in BLOCK}
    module = torch.nn.ParameterDict({"bias": torch.ones(4, 1), "ia3_l": torch.ones(4, 1), "weight": torch.ones(4, 1)})
    assert decayed(module) == ["weight"]


@pytest.mark.parametrize(("total", "steps"), [(37, 7), (38, 8), (1, 1)])
def test_the_decay_of_a_stable_schedule_is_rounded(total: int, steps: int) -> None:
    """A fifth of the run, one step at least."""
    train = TrainConfig(lr_scheduler_type="warmup_stable_decay", lr_decay_ratio=0.2, lr_min_ratio=0.05)
    expected = {"num_decay_steps": steps, "min_lr_ratio": 0.05, "decay_type": "linear"}
    assert scheduler_kwargs(train, total) == expected
