"""Mixtures of experts in 4 bits: what they compute and learn, what is held in memory, what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import moe_tiny
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.adapters.load import apply
from finetune.adapters.merge import (
    adapted_layers,
    inputs_of,
    largest_difference,
    logits_of,
    merge_in_float32,
    prove_sums,
)
from finetune.adapters.methods import check
from finetune.errors import UserError
from finetune.models import attach, experts, loading, quantization
from finetune.recipe.adapters import LoraAdapter
from finetune.recipe.sections import ModelConfig

IDS = torch.arange(3, 40)[None]
REACHED = ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")
"""Where peft knows what all-linear means for the experts."""


@pytest.fixture(scope="module", params=moe_tiny.MIXTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_tiny.write(tmp_path_factory.mktemp("experts") / request.param, request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_tiny.write(tmp_path_factory.mktemp("qwen") / "qwen3_moe", "qwen3_moe")


def config_of(folder: Path, quantization: str | None = "int4", **keys: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), sanity_check=False, quantization=quantization, **keys)


def load(folder: Path, quantization: str | None = "int4", dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    return loading.load_model(config_of(folder, quantization, **keys), dtype)


def adapted(model: Any, seed: int = 1) -> Any:
    """With an adapter that changes what the model computes."""
    found = apply(model, LoraAdapter(r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(found.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_its_weights_stand_for(checkpoint: Path, dtype: torch.dtype) -> None:
    """Bit for bit, as transformers' own network with the unpacked weights; numbers are those of what is held."""
    model, plain = load(checkpoint, dtype=dtype), load(checkpoint, None, dtype)
    size = quantization.measure(model)
    assert size.unquantized_share < 0.03  # routers, and the biases of experts
    assert size.block_parameters == quantization.measure(plain).block_parameters
    assert quantization.parameter_counts(model)[1] == quantization.parameter_counts(plain)[1]
    empty = loading.skeleton(config_of(checkpoint))
    for held, kind in ((model, "int4"), (plain, None)):
        assert quantization.planned_bytes(empty, kind, dtype) == quantization.weight_bytes(held)
    with torch.no_grad():
        packed = model(IDS).logits
        assert torch.equal(packed, model.dequantize()(IDS).logits)
        assert not any(isinstance(module, experts.Experts4bit) for module in model.modules())
    for layer, unpacked in zip(plain.model.layers, model.model.layers, strict=True):
        for name, weight in layer.mlp.named_parameters():
            error = (unpacked.mlp.get_parameter(name) - weight).abs().mean() / weight.abs().mean()
            assert error < 0.12, name  # of normal weights in nf4: 0.09


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_stack_is_quantized_as_bitsandbytes_does_it(kind: str, nested: bool) -> None:
    import bitsandbytes as bnb

    stack = torch.randn(5, 96, 64, generator=torch.Generator().manual_seed(0))
    ours = experts.quantized(stack, kind, nested)
    theirs = bnb.nn.Params4bit(stack.clone(), quant_type=kind, compress_statistics=nested).to("cpu")
    assert torch.equal(ours.data, theirs.data)
    whole = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(experts.dequantized(ours, [0, 1, 2, 3, 4]), whole)
    assert torch.equal(experts.dequantized(ours, [1, 3]), whole[[1, 3]])
    assert quantization.storage_bytes(ours) == quantization.storage_bytes(theirs)


def test_rows_that_are_no_whole_number_of_blocks() -> None:
    """On CPUs bitsandbytes unpacks such matrices with the wrong scales, off by a quarter of a weight and more."""
    stack = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0))
    unpacked = experts.dequantized(experts.quantized(stack, "nf4", True), [0, 1, 2])
    assert (unpacked - stack).abs().mean() < 0.1


def test_gradients_are_those_of_the_unpacked_weights(checkpoint: Path) -> None:
    packed, plain = adapted(load(checkpoint)), adapted(load(checkpoint).dequantize())
    for model in (packed, plain):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in packed.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[n], g, rtol=1e-3, atol=1e-5 * g.abs().max().item()) for n, g in wanted.items())
    on_experts = [name for name in wanted if ".experts." in name]
    assert bool(on_experts) == (packed.config.model_type in REACHED)
    assert all(bool(found[name].any()) for name in on_experts)


def test_learns_is_saved_and_merges(checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(load(checkpoint))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    samples = [IDS[0].tolist(), [7, 8, 9]]
    unmerged = logits_of(model, samples)
    model.save_pretrained(tmp_path)

    again = attach.attach_adapter(load(checkpoint), tmp_path, config_of(checkpoint))
    assert largest_difference(unmerged, logits_of(again, samples))[0] == 0.0
    with again.disable_adapter():
        assert largest_difference(logits_of(load(checkpoint), samples), logits_of(again, samples))[0] == 0.0
    unpacked = attach.attach_adapter(load(checkpoint).dequantize(), tmp_path, config_of(checkpoint))
    sums = prove_sums(unpacked, inputs_of(unpacked, samples[0]), torch.float32)
    assert sums.layers == len(adapted_layers(unpacked)) > 0
    assert 0 < sums.largest_miss < 1e-3
    assert largest_difference(unmerged, logits_of(merge_in_float32(unpacked), samples))[0] < 1e-4
    original = attach.attach_adapter(load(checkpoint, None), tmp_path, config_of(checkpoint))
    both = logits_of(original, samples)
    assert largest_difference(both, logits_of(merge_in_float32(original), samples))[0] < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_any_rank_in_any_precision(qwen: Path, dtype: torch.dtype) -> None:
    """torch multiplies groups in rows of 16 bytes only."""
    model = apply(load(qwen, dtype=dtype), LoraAdapter(r=3))
    before = model(IDS).logits
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "experts" in name and "lora_B" in name}
    assert grads
    assert all(bool(grad.any()) and bool(grad.isfinite().all()) for grad in grads.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in grads:
                parameter += 0.01
    assert not torch.equal(before, model(IDS).logits)


def test_second_adapters_and_checkpointing(qwen: Path) -> None:
    """Adapters beside each other each compute alone; recomputing in the backward pass computes the same."""
    model = adapted(load(qwen))
    first = logits_of(model, [IDS[0].tolist()])
    config = quantization.for_experts(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), model)
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert largest_difference(first, logits_of(model, [IDS[0].tolist()]))[0] > 0.01
    model.set_adapter("default")
    assert largest_difference(first, logits_of(model, [IDS[0].tolist()]))[0] == 0.0
    with pytest.raises(RuntimeError, match="nothing is merged"):
        model.get_base_model().model.layers[0].mlp.experts.merge()

    grads = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.zero_grad()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][name], grad, atol=1e-6) for name, grad in grads[1].items())


def test_groups_of_experts(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few are unpacked at a time."""
    model = load(qwen)
    whole = model(IDS).logits
    monkeypatch.setattr(experts, "AT_ONCE", 1)
    assert torch.allclose(whole, model(IDS).logits, atol=1e-5)


def test_nothing_unpacked_is_kept_for_the_backward_pass(qwen: Path) -> None:
    kept: dict[bool, int] = {}
    for packed in (True, False):
        model = load(qwen) if packed else load(qwen).dequantize()
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            if tensor.ndim == 3 and tensor.shape[0] == 4:  # a stack of experts
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = adapted(model)(input_ids=IDS, labels=IDS).loss
        kept[packed] = sum(sizes.values())
        del loss
    stacks = 4 * 2 * 4 * 3 * 64 * 64  # float32: 2 layers of 4 experts with 3 matrices
    assert kept[False] >= stacks
    assert kept[True] < stacks / 2  # the adapter's own A and B


def test_one_layer_at_a_time_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 layers at most two are in memory unpacked: one, and its matrices as they are put together."""
    folder = moe_tiny.write(tmp_path / "deep", "qwen3_moe", num_hidden_layers=8)
    most, convert = [0], experts.Quantize.convert
    gc.collect()
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}

    def look(self: Any, *args: Any, **more: Any) -> Any:
        new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in before]
        stores = {t.untyped_storage().data_ptr(): t.nbytes for t in new if t.is_floating_point() and t.ndim >= 2
                  and t.device.type == "cpu" and t.shape[-1] == 64 and t.shape[-2] in (64, 128)}  # fmt: skip
        most[0] = max(most[0], sum(stores.values()))
        return convert(self, *args, **more)

    monkeypatch.setattr(experts.Quantize, "convert", look)
    load(folder)
    layer = 4 * 4 * 3 * 64 * 64
    assert 0 < most[0] <= 2 * layer


def test_the_weights_of_a_30b_fit_a_card_of_24_gb() -> None:
    """Qwen3-30B-A3B by its published shapes: its weights, an adapter, its gradients and AdamW's two moments."""
    network = AutoConfig.for_model(
        "qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(network)
    per_weight = 0.5 + 1 / 64 + 4 / (64 * 256)
    in_experts, in_attention = 48 * 128 * 3 * 768 * 2048, 48 * 2048 * (2 * 4096 + 2 * 512)
    rest = 2 * (2 * 151936 * 2048 + 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048)
    held = quantization.planned_bytes(model, "int4", torch.bfloat16)
    assert held == pytest.approx((in_experts + in_attention) * per_weight + rest, rel=1e-4)
    assert quantization.planned_bytes(model, None, torch.bfloat16) == 2 * 30532122624
    trained = {}
    for name, targets, r in (("attention", ["q_proj", "k_proj", "v_proj", "o_proj"], 16), ("all", "all-linear", 4)):
        with torch.device("meta"):
            fresh = AutoModelForCausalLM.from_config(network)
        model = get_peft_model(fresh, LoraConfig(r=r, target_modules=targets), low_cpu_mem_usage=True)
        trained[name] = quantization.parameter_counts(model)[0]
    assert trained["attention"] == 16 * 48 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    card = 24 * 2**30
    print({"weights": held / 1e9, **{name: 16 * count / 1e9 for name, count in trained.items()}})
    assert held + 16 * trained["attention"] < card - 6e9  # room for what a step computes
    assert held + 16 * trained["all"] < card - 4e9


def meta(kind: str, **values: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **values))


def test_int8_is_refused_by_name(qwen: Path) -> None:
    with pytest.raises(UserError, match="no int8"):
        load(qwen, "int8")
    load(qwen, None)


def test_experts_that_compute_in_their_own_way_are_refused() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    network = meta("llama4_text", **small, intermediate_size=64, intermediate_size_mlp=64, head_dim=16,
                   num_local_experts=4, moe_layers=[0])  # fmt: skip
    for kind in ("int8", "int4"):
        with pytest.raises(UserError, match=r"% of the block weights would be left unquantized \(Llama4TextExperts"):
            quantization.check_network(network, ModelConfig(name="m", quantization=kind))
    quantization.check_network(network, ModelConfig(name="m"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("lora_dropout", 0.1), ("init_lora_weights", "loftq"), ("init_lora_weights", "orthogonal")],
)
def test_what_peft_cannot_do_with_experts(qwen: Path, key: str, value: Any) -> None:
    network = loading.skeleton(config_of(qwen))
    with pytest.raises(UserError, match=f"adapter.{key}.*experts"):
        check(network, LoraAdapter(**{key: value}))
    check(network, LoraAdapter(**{key: value, "target_modules": ["q_proj", "v_proj"]}))


def test_misshapen_experts_are_an_error(qwen: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(qwen, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 16}))
    with pytest.raises(UserError, match="misshapen"):
        load(folder)


def test_nothing_is_saved_in_4_bits(qwen: Path, tmp_path: Path) -> None:
    """There is no format for it: the scales would be lost."""
    with pytest.raises(ValueError, match="not serializable"):
        load(qwen).save_pretrained(tmp_path)
