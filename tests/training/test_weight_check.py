"""The proof that a run trained what it was to train: which tensors wait, which are excused, which stop the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finetune.errors import RunError
from finetune.training.weight_check import Proof, bit_sum, check_finite


def network(**shapes: tuple[int, ...]) -> torch.nn.Module:
    """Parameters of ones, by name; two underscores stand for a dot."""
    module: Any = torch.nn.Module()
    for name, shape in shapes.items():
        *parts, last = name.split("__")
        place = module
        for part in parts:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, torch.nn.Parameter(torch.ones(shape)))
    return module


def step(proof: Proof, model: torch.nn.Module, rate: float = 0.1, **gradients: float | None) -> None:
    """One step; the gradients of all parameters are ones but for those named."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = gradients.get(name.replace(".", "__"), 1.0)
            parameter.grad = None if value is None else torch.full_like(parameter, value)
    proof.look()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= rate * parameter.grad
    proof.count(rate)


def test_what_waits_at_first_is_named_and_may_learn_later() -> None:
    """As LoRA's A, whose gradient is zero while B is."""
    model = network(layers__0__a=(2,), layers__0__b=(2,), layers__1__a=(2,))
    proof = Proof(model)
    step(proof, model, layers__0__a=0.0, layers__1__a=0.0)
    step(proof, model, layers__0__a=0.0)
    step(proof, model)
    found = proof.finish()
    assert found["zero_gradient_at_first"] == {"layers.*.a": 2}
    assert found["tensors"] == {"layers.*.a": 2, "layers.*.b": 1}
    assert found["changed_equals_declared"]
    assert not proof.watching, "three steps are enough"


def test_steps_without_a_learning_rate_do_not_count() -> None:
    """A warm-up begins at zero: B has not moved yet."""
    model = network(a=(2,), b=(2,))
    proof = Proof(model)
    for _ in range(4):
        step(proof, model, rate=0.0, a=0.0)
    step(proof, model, a=0.0)
    step(proof, model, a=0.0)
    with pytest.raises(RunError, match="after 3 steps the gradient of a is still exactly zero"):
        step(proof, model, a=0.0)


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_an_expert_may_wait_for_its_token(gradient: float | None) -> None:
    model = network(experts__0__w=(2,), experts__1__w=(2,))
    proof = Proof(model)
    for _ in range(3):
        step(proof, model, experts__1__w=gradient)
    found = proof.finish()
    assert found["unrouted_experts"] == {"experts.*.w": 1}
    assert not found["changed_equals_declared"]


def test_a_layer_that_adalora_cuts_is_where_it_started() -> None:
    model = network(layer__lora_E__default=(2, 1), layer__lora_A__default=(2, 2))
    with torch.no_grad():
        model.get_parameter("layer.lora_E.default").zero_()
    proof = Proof(model)
    for _ in range(3):
        step(proof, model)
    with torch.no_grad():
        model.get_parameter("layer.lora_E.default").zero_()
    found = proof.finish()
    assert found["cut_to_rank_zero"] == {"layer.lora_E": 1}
    assert found["changed_equals_declared"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_one_bit_of_a_large_tensor_is_seen(dtype: torch.dtype) -> None:
    """Which a sum of the values would round away."""
    tensor = torch.full((300, 300), 100, dtype=dtype)
    before = bit_sum(tensor)
    smallest = {torch.float32: 100.00001, torch.bfloat16: 100.5, torch.int8: 101}[dtype]
    tensor[17, 4] = smallest
    assert bit_sum(tensor) != before
    tensor[17, 4] = 100
    assert bit_sum(tensor) == before
    assert bit_sum(torch.empty(2, device="meta")) is None


def test_one_number_that_is_none_is_found() -> None:
    good, bad = torch.ones(50, 50), torch.ones(50, 50)
    check_finite([("good", good)], "at the end")
    for value in (math.nan, -math.inf):
        bad[3, 7] = value
        with pytest.raises(RunError, match="weights are not finite at step 3: bad: lower"):
            check_finite([("good", good), ("bad", bad)], "at step 3")


def test_five_names_are_enough() -> None:
    model = network(**{f"w{i}": (1,) for i in range(8)})
    with pytest.raises(RunError, match="no gradient reaches w0, w1, w2, w3, w4 and 3 more: they would stay"):
        step(Proof(model), model, **dict.fromkeys((f"w{i}" for i in range(8)), None))
