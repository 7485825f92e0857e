"""INT8 and INT4: really quantized, gradients that live, honest numbers, refusals before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families_tiny as tiny
import pytest
import torch

from finetune.errors import UserError
from finetune.models import loading, quantization
from finetune.recipe.sections import ModelConfig

GLM = Path(__file__).parent.parent / "fixtures" / "chatglm" / "chatglm3" / "checkpoint"


def qwen(tmp_path: Path) -> Path:
    from conftest import make_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    tokenizer.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


@pytest.fixture(params=["llama", "qwen", "chatglm3"])
def folder(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> Path:
    return {"llama": lambda: base, "qwen": lambda: qwen(tmp_path), "chatglm3": lambda: GLM}[request.param]()


KINDS: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "int4"},
    "fp4": {"quantization": "int4", "quantization_type": "fp4"},
}


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return loading.load_model(ModelConfig(name=str(folder), sanity_check=False, **settings), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_share_of_quantized_bytes(folder: Path, kind: str) -> None:
    """Every matrix of the blocks is quantized; embeddings and head are not; the numbers are the real ones."""
    plain, model = load(folder), load(folder, **KINDS[kind])
    size = quantization.measure(model)
    assert size.unquantized_share == 0
    assert size.quantized_parameters == size.block_parameters == quantization.measure(plain).block_parameters
    layers = [m for m in model.modules() if quantization.is_quantized(m)]
    packed = sum(m.weight.numel() * m.weight.element_size() for m in layers)
    assert packed == size.quantized_parameters // (1 if kind == "int8" else 2)
    # 8 bit: a float32 per output row; 4 bit: a byte per 64 weights and up to 1.2 KB of tables per layer
    scales = sum(4 * m.out_features if kind == "int8" else m.out_features * m.in_features / 64 + 1200 for m in layers)
    assert packed < size.quantized_bytes <= packed + scales
    assert quantization.parameter_counts(model)[1] == quantization.parameter_counts(plain)[1]
    assert not quantization.is_quantized(model.get_output_embeddings())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_stay_near(folder: Path, kind: str) -> None:
    ids = torch.arange(3, 40)[None]
    exact, close = load(folder)(ids).logits, load(folder, **KINDS[kind])(ids).logits
    assert 0 < (exact - close).abs().mean() < (0.05 if kind == "int8" else 0.5) * exact.std()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_after_an_evaluation_forward(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes' packed 4-bit kernel has no autograd: gradients silently become zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder, dtype, **KINDS[kind]), LoraConfig(r=4, target_modules="all-linear"))
    assert tiny.without_gradient(model, torch.arange(3, 40)[None]) == []


def test_half_quantized_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "HEADS", ["lm_head", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(UserError, match=r"% of the block weights would be left unquantized"):
        load(base, quantization="int4")


@pytest.mark.parametrize("name", ["falcon_h1", "mamba2"])
def test_what_is_read_past_its_layer_is_not_counted_as_packed(name: str, tmp_path: Path) -> None:
    """Projections of Mamba's mixers: transformers leaves them as they are, in the plan as in what is held."""
    config = ModelConfig(name=str(tiny.write_config(tmp_path, tiny.shrunk(name))), quantization="int4")
    empty = loading.skeleton(config)
    if name == "mamba2":
        with pytest.raises(UserError, match="32% of the block weights would be left unquantized → leave it out"):
            quantization.check_network(empty, config)
    else:
        held = load(tmp_path, quantization="int4")
        assert quantization.planned_bytes(empty, "int4", torch.float32) == quantization.weight_bytes(held)


def test_already_quantized_is_refused() -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UserError, match=r"already quantized \(gptq\)"):
        quantization.check_config(ModelConfig(name="m", quantization="int8"), config)


def test_checkpoint_already_in_four_bits_trains(base: Path, tmp_path: Path) -> None:
    """A bitsandbytes checkpoint brings its own settings; gradients live there, too."""
    from peft import LoraConfig, get_peft_model

    load(base, quantization="int4").save_pretrained(tmp_path / "nf4")
    for file in base.glob("*token*"):
        (tmp_path / "nf4" / file.name).write_bytes(file.read_bytes())
    model = get_peft_model(load(tmp_path / "nf4"), LoraConfig(r=4, target_modules="all-linear"))
    assert quantization.measure(model.get_base_model()).quantized_parameters > 0
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(("method", "package"), [("gptq", "gptqmodel"), ("awq", "gptqmodel"), ("hqq", "hqq")])
def test_missing_library_of_a_quantized_checkpoint_is_named(method: str, package: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    with pytest.raises(UserError, match=f"pip install {package}"):
        quantization.check_config(ModelConfig(name="m"), config)
