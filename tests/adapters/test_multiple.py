"""Several adapters on one base: who computes, what stays, what learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.adapters.load import apply
from finetune.adapters.multiple import (
    POLICY,
    REFERENCE,
    VALUE,
    ActiveAdapter,
    activated,
    copy_adapter,
    layers_of,
    named,
    train_only,
)
from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS

IDS = torch.tensor([[3, 40, 50, 60, 70]])
METHODS = [
    "lora", "vera", "oft", "loha", "lokr", "bottleneck", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "bitfit",
    "last_layers", "ln_tuning",
]  # fmt: skip

METHODS_ASK_PEFT = dict.fromkeys(["prompt_tuning", "p_tuning", "prefix_tuning", "ln_tuning"], True)


def adapted(base: Path, method: str, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    return apply(model, ADAPTERS[method](**settings))


@torch.no_grad()
def logits(active: ActiveAdapter) -> torch.Tensor:
    with activated(active) as model:
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


@torch.no_grad()
def disturb(model: Any, adapter: str) -> None:
    for tensor in named(model, adapter).values():
        if isinstance(tensor, torch.nn.Parameter):
            tensor.add_(torch.randn_like(tensor) * 0.05)


def flags(model: Any) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_computes_the_same_and_goes_its_own_way(base: Path, method: str) -> None:
    model = adapted(base, method)
    disturb(model, POLICY)
    for name in (REFERENCE, VALUE):
        copy_adapter(model, POLICY, name)
    train_only(model, [POLICY, VALUE])
    policy, reference, value, off = (ActiveAdapter(model, a) for a in (POLICY, REFERENCE, VALUE, None))
    start = logits(policy)
    assert torch.equal(logits(reference), start)
    assert torch.equal(logits(value), start)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits
    assert torch.equal(logits(off), plain), "with all adapters off it is the base"
    assert not torch.allclose(start, plain, atol=1e-3)
    disturb(model, POLICY)
    assert torch.equal(logits(reference), start)
    assert torch.equal(logits(value), start)
    assert not torch.equal(logits(policy), start)

    trained = {name for name, flag in flags(model).items() if flag}
    assert trained
    assert all(POLICY in n.split(".") or VALUE in n.split(".") for n in trained)
    learned = {key for key, t in named(model, POLICY).items() if t.requires_grad}
    assert learned == {key for key, t in named(model, VALUE).items() if t.requires_grad}
    assert not any(t.requires_grad for t in named(model, REFERENCE).values())
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n in trained)


@pytest.mark.parametrize("method", ["lora", "bitfit", "last_layers", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("adapter", [POLICY, VALUE, None])
def test_activating_leaves_everything_as_it_was(base: Path, method: str, adapter: str | None) -> None:
    model = adapted(base, method)
    copy_adapter(model, POLICY, VALUE)
    train_only(model, [POLICY])
    before, inside = flags(model), None
    with activated(ActiveAdapter(model, adapter)):
        inside = flags(model)
        with activated(ActiveAdapter(model, None if adapter else VALUE)):
            assert flags(model) == before
        assert flags(model) == before
        if adapter is not None:
            assert model.active_adapter == adapter
    assert inside == flags(model) == before
    assert model.active_adapter == POLICY
    with pytest.raises(ZeroDivisionError), activated(ActiveAdapter(model, adapter)):
        raise ZeroDivisionError
    assert flags(model) == before
    assert model.active_adapter == POLICY
    start = logits(ActiveAdapter(model, POLICY))
    with pytest.raises(ValueError, match="nobody"), activated(ActiveAdapter(model, "nobody")):
        pass
    assert flags(model) == before
    assert torch.equal(logits(ActiveAdapter(model, POLICY)), start)


def test_gradients_reach_the_active_adapter_only(base: Path) -> None:
    model = adapted(base, "lora")
    copy_adapter(model, POLICY, VALUE)
    train_only(model, [POLICY, VALUE])
    with activated(ActiveAdapter(model, VALUE)) as found:
        found(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is None for p in named(model, POLICY).values())
    assert all(p.grad is not None for p in named(model, VALUE).values())


@pytest.mark.parametrize("method", METHODS)
def test_switching_by_its_layers_is_switching(base: Path, method: str) -> None:
    """The same outputs and gradients as by peft's `set_adapter`, and nothing else is another."""
    model = adapted(base, method)
    copy_adapter(model, POLICY, VALUE)
    train_only(model, [POLICY, VALUE])
    disturb(model, VALUE)
    layers, before, found = layers_of(model), flags(model), []
    assert (layers is None) == METHODS_ASK_PEFT.get(method, False)
    for given in (None, layers):
        with activated(ActiveAdapter(model, VALUE), given) as value:
            assert value.active_adapter == VALUE
            out = value(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
            out.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((out.detach(), gradients))
        model.zero_grad(set_to_none=True)
        assert model.active_adapter == model.base_model.active_adapter == POLICY if layers else POLICY
        assert flags(model) == before
    with torch.no_grad(), activated(ActiveAdapter(model, None), layers) as off:
        bare = off.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(bare, AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=IDS).logits)
    assert flags(model) == before
    (plain, theirs), (fast, ours) = found
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert all(VALUE in name.split(".") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ActiveAdapter(model, POLICY)), plain[:, -IDS.shape[1] :], atol=1e-3)


def test_plain_models_have_no_adapter_to_activate(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with activated(ActiveAdapter(model)) as found:
        assert found is model


def test_kinds_do_not_mix(base: Path) -> None:
    from finetune.adapters.multiple import _add

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    other = adapted(base, "bitfit").peft_config[POLICY]
    with pytest.raises(UserError, match=r"ppo\.models: separate"):
        _add(model, "other", other, finished=False)
