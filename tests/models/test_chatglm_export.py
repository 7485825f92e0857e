"""Back to the original layout, bit for bit, and out to a stock Glm checkpoint."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from chatglm_reference import CASES, FIXTURES, original_config, random_state, reference_logits, write_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmConfig, GlmForCausalLM

import finetune.models.chatglm.export as export
from finetune.errors import UserError
from finetune.models.chatglm.config import glm_config, read_config
from finetune.models.chatglm.tokenizer import build_tokenizer
from finetune.models.chatglm.weights import load
from finetune.models.weight_files import weight_files


def stored(folder):
    state = {}
    for file in weight_files(folder):
        read = load_file if file.suffix == ".safetensors" else lambda f: torch.load(f, weights_only=True)
        state |= read(file)
    return state


def assert_same_weights(folder, other):
    ours, theirs = stored(folder), stored(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_size", ["5GB", "150KB"])
def test_round_trip_is_bit_equal(tmp_path, case, max_shard_size):
    source = FIXTURES / case / "checkpoint"
    config = read_config(source)
    export.export_original(load(source, dtype=torch.float32), config, tmp_path, max_shard_size, source=source)
    assert read_config(tmp_path) == config
    assert_same_weights(tmp_path, source)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (source / file).read_bytes()
    assert len(weight_files(tmp_path)) == (1 if max_shard_size == "5GB" else len(list(tmp_path.glob("model-*"))))
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size != "5GB")
    for file in weight_files(tmp_path):
        with safe_open(file, "pt") as tensors:
            assert tensors.metadata()["format"] == "pt"
    again = load(tmp_path, dtype=torch.float32)
    assert build_tokenizer(tmp_path)("你好")["input_ids"] == [951, 953, 683, 498]
    assert isinstance(again, GlmForCausalLM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_round_trip(tmp_path, dtype):
    config = original_config(padded_vocab_size=64, torch_dtype=str(dtype).removeprefix("torch."))
    state = {name: tensor.to(dtype) for name, tensor in random_state(config, 0).items()}
    state["transformer.rotary_pos_emb.inv_freq"] = export.inv_freq(config["kv_channels"], dtype)
    source = write_checkpoint(tmp_path / "source", config, state)
    model = load(source)
    assert model.dtype == dtype
    export.export_original(model, config, tmp_path / "out")  # without the source folder inv_freq is computed
    assert_same_weights(tmp_path / "out", source)
    assert read_config(tmp_path / "out") == config
    export.export_original(model.float(), config, tmp_path / "float", source=source)
    assert read_config(tmp_path / "float")["torch_dtype"] == "float32"


def test_the_published_code_is_copied_and_not_run(tmp_path):
    config = original_config(padded_vocab_size=64)
    source = write_checkpoint(tmp_path / "source", config, random_state(config, 0))
    (source / "modeling_chatglm.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    export.export_original(load(source, dtype=torch.float32), config, tmp_path / "out", source=source)
    assert (tmp_path / "out" / "modeling_chatglm.py").exists()
    assert not (tmp_path / "out" / "README.md").exists()


def test_changed_weights_arrive(tmp_path):
    """The exported layout means the same network to the reference forward."""
    config = original_config(padded_vocab_size=64, num_layers=2)
    model = load(write_checkpoint(tmp_path / "source", config, random_state(config, 0)), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    export.export_original(model, config, tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert (reference_logits(config, stored(tmp_path / "out"), ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_a_stock_checkpoint(tmp_path, case):
    source = FIXTURES / case / "checkpoint"
    model = load(source, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    build_tokenizer(source).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = plain.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)("你好")["input_ids"] == [951, 953, 683, 498]
    # and from there to the original layout again
    export.export_original(plain, read_config(source), tmp_path / "original", source=source)
    assert_same_weights(tmp_path / "original", source)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_ratio": 50},
        {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 8},
        {"add_qkv_bias": False, "layernorm_epsilon": 1.5625e-07, "pad_token_id": 9, "eos_token_id": [9, 11]},
    ],
)
def test_original_config_maps_back(changes):
    config = glm_config(original_config(**changes), "x")
    name = changes.get("_name_or_path", "THUDM/chatglm3-6b")
    assert glm_config(export.original_config(config, name), "x").to_dict() == config.to_dict()


def test_a_natively_made_model_in_the_original_layout(tmp_path):
    config = GlmConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, pad_token_id=0, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = GlmForCausalLM(config).eval()
    written = export.original_config(config)
    export.export_original(model, written, tmp_path)
    again = load(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
        expected = reference_logits(written, stored(tmp_path), ids)
        assert (expected - model(input_ids=ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": 0.5}},
            None,
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
            "rope_parameters",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_the_original_layout_cannot_hold_is_refused(change, key):
    config = GlmConfig(**{**glm_config(original_config(), "x").to_dict(), **change})
    with pytest.raises(UserError) as error:
        export.original_config(config)
    assert key is None or error.value.problems[0].key == key


def test_another_networks_config_is_refused(tmp_path):
    model = load(FIXTURES / "chatglm3" / "checkpoint", dtype=torch.float32)
    with pytest.raises(UserError, match=r"num_hidden_layers: the model has 3, the original config\.json means 4"):
        export.export_original(model, original_config(num_layers=4), tmp_path)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 20000.0}
    with pytest.raises(UserError, match="rope_parameters"):
        export.export_original(model, original_config(), tmp_path)
    assert not list(tmp_path.iterdir())


# peft reads a property that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_wrapped_and_quantized_models_are_refused(tmp_path):
    model = load(FIXTURES / "chatglm3" / "checkpoint", dtype=torch.float32)
    quantized = SimpleNamespace(is_quantized=True, config=model.config)
    with pytest.raises(UserError, match="dequantize it first"):
        export.export_original(quantized, original_config(), tmp_path)
    model.model.layers[0].mlp.bottleneck = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"bottleneck\.bias does not belong in this layout"):
        export.export_original(model, original_config(), tmp_path)
    del model.model.layers[0].mlp.bottleneck
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="merge adapters first"):
        export.export_original(wrapped, original_config(), tmp_path)
    assert not list(tmp_path.iterdir())
