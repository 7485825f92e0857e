"""Every method on three families in memory: starts as the base, learns, goes away, comes back, generates, merges."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import UNMERGEABLE, VARIANTS
from peft import PeftModel
from pydantic import TypeAdapter
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from finetune.adapters import adalora, load, merge, methods
from finetune.adapters.methods import rewrites
from finetune.models import quantization
from finetune.recipe.adapters import Adapter
from finetune.training.weight_check import Proof

IDS = torch.randint(3, 262, (2, 20), generator=torch.Generator().manual_seed(0))
SECTIONS: TypeAdapter[Any] = TypeAdapter(Adapter)


def make(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1, **changes,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).eval()
    return GlmForCausalLM(GlmConfig(**sizes, head_dim=8, attention_bias=True, partial_rotary_factor=0.5)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :].float()


def fit(model: Any, rate: float, steps: int = 6, autocast: bool = False) -> list[float]:
    """A few steps of AdamW under gradient checkpointing, followed by the proof."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    proof, losses = Proof(model), []
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # once per step: it keeps casts until its end
            loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        loss.backward()
        proof.look()
        optimizer.step()
        adalora.allocate(model, step + 1)
        optimizer.zero_grad()
        proof.count(rate)
        losses.append(loss.item())
    assert proof.finish()["changed_equals_declared"]
    return losses


def adapted(family: str, variant: str, base: Any) -> tuple[Any, float]:
    values, rate = VARIANTS[variant]
    section = SECTIONS.validate_python(values)
    torch.manual_seed(1)
    model = load.apply(base, section, _words)
    if section.method == "adalora":
        adalora.plan(model, section, 6)
    return model, rate


class _Words:
    """Enough of a tokenizer to start a prompt from text."""

    all_special_ids = (0, 1, 2)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte for byte in text.encode()]}


_words = _Words()
HERE = [variant for variant in VARIANTS if variant not in ("full", "loftq", "lora+")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm"])
@pytest.mark.parametrize("variant", HERE)
def test_method(variant: str, family: str, tmp_path: Path) -> None:
    base = make(family)
    bare = logits(base)
    model, rate = adapted(family, variant, base)
    values = VARIANTS[variant][0]
    soft = values["method"] in ("prompt_tuning", "p_tuning", "prefix_tuning")
    # A rewritten base is W - s B A + s B A: the same but for float32's rounding of sums as large as W.
    rounding = 1e-4 if rewrites(values.get("init_lora_weights")) else 1e-5
    if not soft:
        torch.testing.assert_close(logits(model), bare, atol=rounding, rtol=0)
    losses = fit(model, rate)
    assert losses[-1] < losses[0]
    trained = logits(model)
    assert (trained - bare).abs().max() > 1e-2

    load.save(model, tmp_path)
    again = PeftModel.from_pretrained(make(family), tmp_path)
    torch.testing.assert_close(logits(again), trained, atol=2 * rounding, rtol=0)
    with again.disable_adapter():
        assert torch.equal(logits(again), bare), "adapter off is the base, also after pissa and olora"

    answer = again.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    longer = IDS
    for _ in range(3):
        with torch.no_grad():
            longer = torch.cat([longer, again(longer).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer[:, IDS.shape[1] :], longer[:, IDS.shape[1] :]), "generates what it computes"

    if values["method"] not in UNMERGEABLE and variant != "bitfit all":
        sums = merge.prove_sums(again, merge.inputs_of(again, IDS[0].tolist()), torch.float32)
        assert sums.largest_miss < 1e-5
        merge.merge_in_float32(again).save_pretrained(tmp_path / "merged")
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        merge.check_written(sums, written)
        torch.testing.assert_close(logits(written), trained, atol=3e-5, rtol=0)


@pytest.mark.parametrize("variant", ["lora", "bottleneck houlsby", "prefix_tuning", "prompt_tuning", "bitfit"])
def test_checkpointing_changes_nothing(variant: str) -> None:
    """peft refuses prefix tuning here, and transformers would take the prefix away."""
    gradients = []
    for checkpointing in (False, True):
        model, _ = adapted("llama", variant, make("llama"))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", ["bottleneck houlsby", "bottleneck parallel", "bitfit", "last_layers", "ln_tuning"])
def test_bfloat16_base(variant: str, tmp_path: Path) -> None:
    """Trainables are float32 on a bfloat16 base; the merged model rounds once."""
    base = make("llama").to(torch.bfloat16)
    model, rate = adapted("llama", variant, base)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    losses = fit(model, rate, autocast=True)
    assert losses[-1] < losses[0]
    trained = logits(model)
    if VARIANTS[variant][0]["method"] not in UNMERGEABLE:
        merged = merge.merge_in_float32(model)
        assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
        torch.testing.assert_close(logits(merged), trained, atol=0.1, rtol=0)


def test_bias_slots_are_filled() -> None:
    """Merged biases are real ones: the flag is set, and layers that share it have a bias, too."""
    base = make("llama")
    model, _ = adapted("llama", "bitfit", base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bitfit_" in name:
                parameter.normal_()
    merged = merge.merge_in_float32(model)
    assert merged.config.attention_bias
    assert merged.config.mlp_bias
    assert merged.model.layers[0].mlp.up_proj.bias.abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm"])
def test_merged_biases_add_no_strange_keys(family: str) -> None:
    base = make(family)
    known = {*base.config.to_dict(), "attention_bias", "mlp_bias"}
    model, rate = adapted(family, "bitfit", base)
    fit(model, rate)
    written = merge.merge_in_float32(model).config.to_dict()
    assert set(written) <= known
    assert "" not in written


def test_last_layers_of_a_tied_head_unties_it() -> None:
    merged_of = {}
    for variant in ("last_layers", "last_layers head"):
        model, rate = adapted("qwen2", variant, make("qwen2"))
        fit(model, rate)
        merged_of[variant] = merge.merge_in_float32(model)
    assert merged_of["last_layers"].config.tie_word_embeddings
    assert not merged_of["last_layers head"].config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_last_layers_of_a_quantized_base_that_has_been_run(kind: str, tmp_path: Path) -> None:
    """The copies stand for the quantized weights, which are left as they were."""
    from transformers import BitsAndBytesConfig

    make("llama").save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "int4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    quantization.after_loading(base, "llama")
    bare = logits(base)
    model, rate = adapted("llama", "last_layers", base)
    torch.testing.assert_close(logits(model), bare, atol=5e-2, rtol=0)  # int8 also rounds activations
    losses = fit(model, rate)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)


def test_every_family_has_defaults() -> None:
    """No `target_modules` anywhere: places are found in the model itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for family in ("llama", "qwen2", "glm"):
            for variant in HERE:
                methods.check(make(family), SECTIONS.validate_python(VARIANTS[variant][0]))
