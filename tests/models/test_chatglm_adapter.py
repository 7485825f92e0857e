"""LoRA adapters from one layout to the other: the recorded one, and random ones against the weights they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from chatglm_reference import FIXTURES, original_config, random_state, reference_logits, write_checkpoint
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.models.adapter_files import save_adapter
from finetune.models.chatglm.adapter import (
    convert_adapter_from_original,
    convert_adapter_to_original,
    is_original_adapter,
)
from finetune.models.chatglm.config import read_config
from finetune.models.chatglm.weights import load

# peft reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ADAPTER = FIXTURES / "chatglm3" / "adapter_original"
CHECKPOINT = FIXTURES / "chatglm3" / "checkpoint"
PREFIX = "base_model.model.transformer.encoder.layers."


def test_an_adapter_of_the_original_layout_gives_its_recorded_logits(tmp_path):
    assert is_original_adapter(ADAPTER)
    config, weights = convert_adapter_from_original(ADAPTER, read_config(CHECKPOINT))
    save_adapter(config, weights, tmp_path)
    assert not is_original_adapter(tmp_path)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (4, 8, {}, {})
    base = load(CHECKPOINT, dtype=torch.float32)
    recorded = load_file(ADAPTER / "logits_golden.safetensors")
    with torch.no_grad():
        without = base(input_ids=recorded["input_ids"]).logits
        logits = PeftModel.from_pretrained(base, tmp_path)(input_ids=recorded["input_ids"]).logits
    assert (logits - recorded["logits"]).abs().max() < 1e-4  # measured 0.0
    assert (without - recorded["logits"]).abs().max() > 1e-2


def test_there_and_back_is_bit_equal(tmp_path):
    source = read_config(CHECKPOINT)
    save_adapter(*convert_adapter_from_original(ADAPTER, source), tmp_path)
    config, weights = convert_adapter_to_original(tmp_path, source)
    recorded = load_file(ADAPTER / "adapter_model.safetensors")
    assert weights.keys() == recorded.keys()
    assert all(torch.equal(weights[name], recorded[name]) for name in recorded)
    published = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config.target_modules == set(published["target_modules"])
    assert (config.r, config.lora_alpha, config.rank_pattern) == (published["r"], published["lora_alpha"], {})


def trained(folder, base, **options):
    """A native adapter with random weights, as peft saves it."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.2)
    # "auto" compares vocab_size in the base's config.json, which the original layout calls padded_vocab_size.
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def updated_state(state, folder, source):
    """Original weights with an original adapter added in, by the formula alone: W + scale · B A, DoRA renormalised."""
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights, state = load_file(folder / "adapter_model.safetensors"), dict(state)
    for name, a in weights.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        short = module.rsplit(".", 1)[-1]
        own = {**adapter, "r": adapter["rank_pattern"].get(short, adapter["rank_pattern"].get(module, adapter["r"]))}
        alpha = adapter["alpha_pattern"].get(short, adapter["alpha_pattern"].get(module, adapter["lora_alpha"]))
        assert own["r"] == a.shape[0]
        scale = alpha / (own["r"] ** 0.5 if adapter["use_rslora"] else own["r"])
        weight = state[f"{module}.weight"] + scale * weights[f"base_model.model.{module}.lora_B.weight"] @ a
        if adapter["use_dora"]:
            magnitude = weights[f"base_model.model.{module}.lora_magnitude_vector"]
            weight = weight * (magnitude / weight.norm(dim=1)).unsqueeze(1)
        state[f"{module}.weight"] = weight
    for name, tensor in weights.items():
        if ".lora_" not in name:  # modules_to_save, trained biases
            state[name.removeprefix("base_model.model.")] = tensor
    return state


QKV = ["q_proj", "k_proj", "v_proj"]
ADAPTERS = {
    "all": {"target_modules": [*QKV, "o_proj", "gate_up_proj", "down_proj"]},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"target_modules": [*QKV, "down_proj"], "use_rslora": True},
    "dora": {"target_modules": [*QKV, "o_proj"], "use_dora": True},
    "own ranks": {
        "target_modules": QKV, "alpha_pattern": {"q_proj": 5},
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.v_proj": 3},
    },
    "one layer": {"target_modules": [*QKV, "gate_up_proj"], "layers_to_transform": [1]},
    "output layer saved whole": {"target_modules": QKV, "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("network", ["grouped", "per head"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_native_adapters_mean_the_same_in_the_original_layout(tmp_path, name, network):
    source = original_config(num_layers=2, padded_vocab_size=64, multi_query_attention=network == "grouped")
    state = random_state(source, 0)
    base = write_checkpoint(tmp_path / "base", source, state)
    model = trained(tmp_path / "native", load(base, dtype=torch.float32), **ADAPTERS[name])
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = reference_logits(source, state, ids)
    save_adapter(*convert_adapter_to_original(tmp_path / "native", source), tmp_path / "original")
    assert is_original_adapter(tmp_path / "original")
    logits = reference_logits(source, updated_state(state, tmp_path / "original", source), ids)
    assert (expected - plain).abs().max() > 1e-2
    assert (logits - expected).abs().max() < 2e-4
    # and back: A is stacked now, the update is the same
    save_adapter(*convert_adapter_from_original(tmp_path / "original", source), tmp_path / "again")
    again = PeftModel.from_pretrained(load(base, dtype=torch.float32), tmp_path / "again").eval()
    with torch.no_grad():
        assert (again(input_ids=ids).logits - expected).abs().max() < 2e-4


def test_rank_and_alpha_of_the_fused_layer_grow_threefold(tmp_path):
    source = original_config(num_layers=2, padded_vocab_size=64)
    base = write_checkpoint(tmp_path / "base", source, random_state(source, 0))
    trained(tmp_path / "native", load(base, dtype=torch.float32), **ADAPTERS["all"])
    config, weights = convert_adapter_to_original(tmp_path / "native", source)
    assert config.target_modules == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (config.rank_pattern, config.alpha_pattern) == ({"query_key_value": 12}, {"query_key_value": 24})
    assert weights[PREFIX + "0.self_attention.query_key_value.lora_A.weight"].shape == (12, 64)
    b = weights[PREFIX + "0.self_attention.query_key_value.lora_B.weight"]
    assert not b[:64, 4:].any()  # block-diagonal: q's rows see only q's A
    assert b[:64, :4].any()


def test_older_files_and_patterns_load(tmp_path):
    """adapter_model.bin, a regular expression as target, biases trained with the adapter."""
    source = read_config(CHECKPOINT)
    state = load_file(ADAPTER / "adapter_model.safetensors")
    bias = torch.randn(sum((64, 32, 32)))
    state[PREFIX + "0.self_attention.query_key_value.bias"] = bias
    torch.save(state, tmp_path / "adapter_model.bin")
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"target_modules": r".*(query_key_value|dense.*)", "bias": "lora_only"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    adapter, weights = convert_adapter_from_original(tmp_path, source)
    assert adapter.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    q, k, v = (weights[f"base_model.model.model.layers.0.self_attn.{name}.bias"] for name in QKV)
    assert torch.equal(torch.cat([q, k, v]), bias)


def test_what_cannot_be_joined_is_refused(tmp_path):
    source = original_config(num_layers=2, padded_vocab_size=64)
    base = write_checkpoint(tmp_path / "base", source, random_state(source, 0))
    trained(tmp_path / "dora", load(base, dtype=torch.float32), target_modules=["q_proj", "v_proj"], use_dora=True)
    with pytest.raises(UserError, match="lora_magnitude_vector of q_proj, k_proj and v_proj cannot be joined"):
        convert_adapter_to_original(tmp_path / "dora", source)


def test_other_adapter_types(tmp_path):
    source = original_config(num_layers=1, padded_vocab_size=64)
    base = load(write_checkpoint(tmp_path / "base", source, random_state(source, 0)), dtype=torch.float32)
    soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(base, soft).save_pretrained(tmp_path / "soft", save_embedding_layers=False)
    config, weights = convert_adapter_from_original(tmp_path / "soft", source)
    assert config.num_virtual_tokens == 3  # virtual tokens are the same in both layouts
    assert weights["prompt_embeddings"].shape == (3, 64)
    shutil.copytree(ADAPTER, tmp_path / "other")
    settings = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    settings = {"peft_type": "IA3", "target_modules": ["query_key_value"], "feedforward_modules": [], "task_type": None}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match=r"IA3 adapter belongs to the layout.*only LoRA"):
        convert_adapter_from_original(tmp_path / "other", source)


def test_folders_that_hold_no_adapter(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        convert_adapter_from_original(tmp_path, original_config())
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        is_original_adapter(tmp_path)


def test_an_adapter_for_another_shape_is_an_error(tmp_path):
    shutil.copy(ADAPTER / "adapter_config.json", tmp_path)
    state = load_file(ADAPTER / "adapter_model.safetensors")
    save_file(
        {name: tensor[:-1].contiguous() for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"query_key_value.*127 rows"):
        convert_adapter_from_original(tmp_path, read_config(CHECKPOINT))
