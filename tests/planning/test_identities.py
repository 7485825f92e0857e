"""What textbooks say of parameters, memory and FLOPs, and the published sizes of models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from finetune.models.quantization import planned_bytes
from finetune.planning import speed
from finetune.planning.memory import STATES, estimate, kv_bytes, timeline
from finetune.planning.network import Network, build
from finetune.planning.source import SHIPPED, skeleton
from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import ModelConfig
from finetune.training.optim import OPTIMIZERS, MuonWithAdamW

pytestmark = pytest.mark.whole
H, L, INNER, V = 64, 5, 160, 500
SMALL: dict[str, Any] = {
    "hidden_size": H, "num_hidden_layers": L, "intermediate_size": INNER, "vocab_size": V, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FP32 = {"name": "tiny-llama", "dtype": "float32"}


def recipe(stage: str = "sft", **sections: Any) -> Any:
    values = {
        "version": 1, "stage": stage, "model": FP32, "output": {"dir": "r"}, "adapter": {"method": "full"},
        "data": {"train": "d", "max_length": 32}, **sections,
    }  # fmt: skip
    return resolve(check(values, stage), Hardware())


def without_weights(kind: str, **more: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **more}))


def network(kind: str = "llama", made: Any = None, **more: Any) -> Network:
    return build(made or recipe(), without_weights(kind, **more))


def attention(kv: int, head: int = 16, bias: int = 0) -> int:
    """q, k, v and the output projection; biases on the first three."""
    return 2 * H * 4 * head + 2 * H * kv * head + bias * (4 + 2 * kv) * head


FORMULAS = {
    "llama": ({}, 2 * V * H + L * (attention(4) + 3 * H * INNER + 2 * H) + H),
    "llama tied, grouped": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True}, V * H + L * (attention(2) + 3 * H * INNER + 2 * H) + H,
    ),
    "qwen2": ({"num_key_value_heads": 2}, 2 * V * H + L * (attention(2, bias=1) + 3 * H * INNER + 2 * H) + H),
    "mistral": (
        {"num_key_value_heads": 2, "sliding_window": 8}, 2 * V * H + L * (attention(2) + 3 * H * INNER + 2 * H) + H,
    ),
    "gemma3_text": ({"head_dim": 16}, V * H + L * (attention(4) + 2 * 16 + 3 * H * INNER + 4 * H) + H),
    "gpt_neox": ({}, 2 * V * H + L * (4 * H * H + 4 * H + 2 * H * INNER + H + INNER + 4 * H) + 2 * H),
    "qwen3_moe": (
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        2 * V * H + L * (attention(4) + 2 * 16 + 8 * H + 8 * 3 * H * 32 + 2 * H) + H,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_parameters_per_architecture(name: str) -> None:
    more, expected = FORMULAS[name]
    found = network(name.split()[0], **more)
    assert (found.total, found.trainable) == (expected, expected)


SIZES = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "THUDM/chatglm3-6b": 6_243_584_000,
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_shipped_models_have_their_published_size(name: str) -> None:
    assert sum(p.numel() for p in skeleton(ModelConfig(name=name)).parameters()) == SIZES[name]


def test_every_shipped_config_is_of_a_model_above() -> None:
    assert {folder.name for folder in SHIPPED.iterdir()} == {name.replace("/", "--") for name in SIZES}


def test_a_token_goes_through_its_experts_only() -> None:
    more, total = FORMULAS["qwen3_moe"]
    found = network("qwen3_moe", **more)
    assert found.active == total - L * 6 * 3 * H * 32
    flops = {
        k: estimate(network("qwen3_moe", **{**more, "num_experts": k}), recipe(), 2, 32, "cpu").flops for k in (4, 8)
    }
    routers = 2 * 3 * (8 - 4) * H * L * 64
    assert flops[8] - flops[4] == routers, "four experts more are a wider router, and no more to compute"


def test_full_training_takes_16_bytes_a_parameter() -> None:
    found = network()
    parts = estimate(found, recipe(), 2, 32, "cpu", accumulation=2).parts
    held = parts["weights"] - found.weights + parts["gradients"] + parts["optimizer"]
    assert held == 16 * found.total
    assert found.weights < 1000, "buffers only"


def test_quantized_weights_are_those_that_loading_makes() -> None:
    model = {"name": "tiny-llama", "dtype": "bfloat16", "quantization": "int4"}
    base = without_weights("llama")
    for kind in ("int4", "int8"):
        made = recipe(model={**model, "quantization": kind}, adapter={"method": "lora"})
        buffers = sum(b.numel() * 4 for b in base.buffers())
        assert build(made, base).weights - buffers == planned_bytes(base, kind, torch.bfloat16)


def test_six_flops_a_parameter_and_token() -> None:
    """Forward 2, backward 4: 6 P C, of the parameters that are multiplied (not the embedding), besides attention."""
    found, rows, length = network(), 2, 32
    multiplied = found.total - V * H - (2 * L + 1) * H
    squares = 12 * L * rows * 4 * length * length * 16  # two products, of forward and twice of backward
    head = 2 * V * H * rows * length  # which is computed again in the backward pass of the fused head
    ends = 4 * 2 * V * H * rows  # the last position predicts nothing
    expected = 6 * multiplied * rows * length + head + squares - ends
    assert estimate(found, recipe(), rows, length, "cpu").flops == expected


def test_frozen_weights_take_four_and_adapters_six() -> None:
    """No gradient of a frozen weight: 2 forward, 2 for what goes on backwards, and nothing goes on below the first
    adapters."""
    made = recipe(adapter={"method": "lora", "r": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0})
    found, tokens = network(made=made), 2 * 32
    flops = {m.name: m.flops for m in timeline(found, made, 2, 32)}
    block = 4 * H * H + 3 * H * INNER
    adapters = 2 * 8 * (H + H)
    square = 4 * 2 * 4 * 32 * 32 * 16
    assert flops["forward 1"] == 2 * tokens * (block + adapters) + square
    assert flops["backward 1"] == 2 * tokens * (block + 2 * adapters) + 2 * square
    first = 2 * tokens * (3 * H * H + 2 * 8 * H)  # neither projections nor adapters pass anything on to embeddings
    assert flops["backward 1"] - flops["backward 0"] == first


@pytest.mark.parametrize("length", [32, 128])
def test_attention_against_linear_is_t_over_6h(length: int) -> None:
    """12 H² weights a block (an MLP of two matrices of 4 H): 24 H² FLOPs a token, and 4 T H of attention."""
    found = network("gpt_neox", intermediate_size=4 * H)
    flops = next(m.flops for m in timeline(found, recipe(), 1, length) if m.name == "forward 1")
    linear = 24 * H * H * length
    assert (flops - linear) / linear == pytest.approx(length / (6 * H))


def test_recomputing_costs_a_forward_pass_and_leaves_block_inputs() -> None:
    plain, again = recipe(), recipe(train={"gradient_checkpointing": True})
    kept = {made.train.gradient_checkpointing: timeline(network(made=made), made, 2, 32) for made in (plain, again)}
    forward = sum(m.flops for m in kept[False] if m.name.startswith("forward"))
    last = L * 2 * 64 * INNER * H  # what the last product of a block makes, its backward pass does not need
    assert sum(m.flops for m in kept[True]) - sum(m.flops for m in kept[False]) == forward - last
    grown = [b.level - a.level for a, b in zip(kept[True], kept[True][1:], strict=False) if a.name == "forward 1"]
    assert grown[0] < 4 * 2 * 32 * H * 1.2, "the hidden state, and what little the checkpoint needs"


def test_eager_attention_keeps_a_square_of_scores() -> None:
    """heads · T² values a row and block; sdpa keeps the mask instead, 1 · T² of float32. Flash attention as sdpa."""
    rows, heads, length = 2, 4, 256

    def grown(kernel: str | None) -> int:
        made = recipe(model={**FP32, "attn_implementation": kernel})
        moments = timeline(network(made=made), made, rows, length)
        return next(b.level - a.level for a, b in itertools.pairwise(moments) if a.name == "forward 1")

    assert grown("eager") - grown("sdpa") == pytest.approx(4 * rows * (heads - 1) * length**2, rel=0.02)
    assert grown("sdpa") == grown("flash_attention_2") == grown(None)


def test_keys_and_values() -> None:
    """2 · layers · heads · size · tokens · bytes; grouped heads are fewer, and a window holds its width."""
    made = recipe("ppo", adapter={"method": "lora"}, reward={"functions": ["x.py:f"]}, ppo={"max_new_tokens": 8},
                  eval={"batch_size": 4})  # fmt: skip
    rows = 4
    assert kv_bytes(network(made=made), made, rows, 40) == 2 * L * 4 * 16 * 40 * 4 * rows
    assert kv_bytes(network(made=made, num_key_value_heads=2), made, rows, 40) == 2 * L * 2 * 16 * 40 * 4 * rows
    sliding = network("mistral", made=made, sliding_window=10)
    assert kv_bytes(sliding, made, rows, 40) == 2 * L * 4 * 16 * 10 * 4 * rows
    some = network("gemma3_text", made=made, head_dim=16, sliding_window=10)
    layers = some.model.config.layer_types
    held = 10 * layers.count("sliding_attention") + 40 * layers.count("full_attention")
    assert 0 < layers.count("full_attention") < L or held == 10 * L
    assert kv_bytes(some, made, rows, 40) == 2 * held * 4 * 16 * 4 * rows


def test_optimizers_hold_what_they_hold() -> None:
    shape = torch.Size([512, 256])
    numel = shape.numel()
    assert STATES["adamw"](shape) == 8 * numel
    assert STATES["adamw_8bit"](shape) == 2 * (numel + 4 * numel // 256)
    assert STATES["adamw_8bit"](torch.Size([64])) == 8 * 64, "small tensors stay in float32"
    assert STATES["adafactor"](shape) == 4 * (512 + 256)
    assert STATES["sgd"](shape) == 0
    assert STATES["muon"](shape) == 4 * numel


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_state_is_that_of_the_optimizer(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(128, 64))
    if name == "muon":
        optimizer: Any = MuonWithAdamW([weight], [], recipe().train)
    else:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(
            TrainingArguments(optim=OPTIMIZERS[name], report_to="none")
        )
        optimizer = kind([weight], **options)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    parts = getattr(optimizer, "parts", [optimizer])
    tables = ("qmap1", "qmap2")  # one of each for all tensors
    held = sum(
        t.numel() * t.element_size()
        for part in parts for state in part.state.values() for key, t in state.items()
        if isinstance(t, torch.Tensor) and t.ndim and key not in tables
    )  # fmt: skip
    assert held == pytest.approx(STATES[name](weight.shape), rel=0.01)


def test_seconds_at_30_to_70_percent() -> None:
    assert speed.seconds(70e12, 100) == pytest.approx((1.0, 1.4, 7 / 3))
