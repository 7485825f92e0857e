"""ChatGLM's original layout in GlmForCausalLM: recorded goldens, random other networks, refusals, quantization."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from chatglm_reference import CASES, FIXTURES, original_config, random_state, reference_logits, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GlmForCausalLM

from finetune.errors import UserError
from finetune.models.chatglm.config import glm_config, read_config
from finetune.models.chatglm.export import export_original
from finetune.models.chatglm.weights import Fused, fetch, load, original_shapes
from finetune.models.layouts import LAYOUTS, layout_of


@pytest.fixture(scope="module", params=CASES)
def case(request):
    folder = FIXTURES / request.param
    return folder, load(folder / "checkpoint", dtype=torch.float32)


def goldens(folder: Path, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_logits_are_those_of_the_original_code(case):
    folder, model = case
    recorded = load_file(folder / "logits_golden.safetensors")
    for batch in goldens(folder, "logits_golden.json")["batches"]:
        name = batch["name"]
        inputs = {
            key: recorded[f"{name}.{key}"]
            for key in ("input_ids", "attention_mask", "position_ids") if f"{name}.{key}" in recorded
        }  # fmt: skip
        with torch.no_grad():
            difference = (model(**inputs).logits - recorded[f"{name}.logits"]).abs()
        if "attention_mask" in inputs:
            difference = difference[inputs["attention_mask"].bool()]
        # Measured 0.0 on one CPU; GLM-4's epsilon alone would give 6e-4.
        assert difference.max() < 1e-4, name


def test_loss_is_that_of_the_original_code(case):
    folder, model = case
    recorded = load_file(folder / "logits_golden.safetensors")
    if "loss.input_ids" not in recorded:
        pytest.skip("no loss recorded for this case")
    with torch.no_grad():
        loss = model(input_ids=recorded["loss.input_ids"], labels=recorded["loss.labels"]).loss
    assert float(loss) == pytest.approx(goldens(folder, "logits_golden.json")["loss"], abs=1e-5)


def test_greedy_generations_are_those_of_the_original_code(case):
    folder, model = case
    for row in goldens(folder, "generation_golden.json"):
        inputs = {key: torch.tensor(row[key]) for key in ("input_ids", "attention_mask")}
        # The positions of the original are those that transformers derives from the mask.
        made = model.generate(
            **inputs, do_sample=False, max_new_tokens=row["max_new_tokens"], eos_token_id=row["eos_token_id"],
            pad_token_id=row["pad_token_id"],
        )  # fmt: skip
        assert made.tolist() == row["output_ids"]


def test_the_loaded_model_is_stock_and_saves_as_stock(case, tmp_path):
    model = case[1]
    assert type(model) is GlmForCausalLM
    model.save_pretrained(tmp_path)  # the default, which would write original names under model_type glm
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is GlmForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


NETWORKS = {
    "grouped": {"num_layers": 2, "hidden_size": 40, "num_attention_heads": 6, "multi_query_group_num": 3},
    "one group": {"num_layers": 1, "hidden_size": 32, "multi_query_group_num": 1, "kv_channels": 12},
    "as many groups as heads": {"num_attention_heads": 3, "multi_query_group_num": 3, "kv_channels": 20},
    "no bias": {"add_qkv_bias": False, "num_layers": 2},
    "per-head rows": {"multi_query_attention": False, "num_attention_heads": 5, "kv_channels": 8, "hidden_size": 24},
    "chatglm2-6b": {"_name_or_path": "THUDM/chatglm2-6b", "kv_channels": 8, "layernorm_epsilon": 1e-3},
    "chatglm2-6b-32k": {"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 50},
    "chatglm3-6b-128k": {"_name_or_path": "THUDM/chatglm3-6b-128k", "rope_ratio": 500},
    "glm-4-9b": {
        "_name_or_path": "THUDM/glm-4-9b-chat", "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07,
        "pad_token_id": 150, "eos_token_id": [150, 151, 153],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_networks_equal_an_independent_forward(tmp_path, name, seed):
    config = original_config(padded_vocab_size=160, ffn_hidden_size=56, **NETWORKS[name])
    state = random_state(config, seed)
    ids = torch.randint(160, (2, 30), generator=torch.Generator().manual_seed(seed))
    model = load(write_checkpoint(tmp_path, config, state), dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    expected = reference_logits(config, state, ids, interpolate=name == "chatglm2-6b-32k")
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < 1e-4
    if config.get("rope_ratio", 1) != 1:  # the two readings of rope_ratio are far apart: the test can fail
        other = reference_logits(config, state, ids, interpolate=name != "chatglm2-6b-32k")
        assert (logits - other).abs().max() > 1e-2


def test_random_shapes_load_from_sharded_pickles(tmp_path):
    draw = random.Random(7)
    for trial in range(4):
        groups = draw.choice([1, 2])
        config = original_config(
            num_layers=draw.choice([1, 3]), hidden_size=draw.choice([16, 48]), ffn_hidden_size=draw.choice([24, 72]),
            num_attention_heads=groups * draw.choice([1, 2, 3]), multi_query_group_num=groups,
            kv_channels=draw.choice([4, 8, 16]), padded_vocab_size=draw.choice([64, 96]),
        )  # fmt: skip
        state, folder = random_state(config, trial), tmp_path / str(trial)
        write_checkpoint(folder, config, {})
        (folder / "model.safetensors").unlink()
        names = list(state)
        shards = {f"pytorch_model-0000{i + 1}-of-00003.bin": names[i::3] for i in range(3)}
        for file, keys in shards.items():
            torch.save({key: state[key] for key in keys}, folder / file)
        weight_map = {key: file for file, keys in shards.items() for key in keys}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        ids = torch.arange(20)[None]
        with torch.no_grad():
            logits = load(folder, dtype=torch.float32)(input_ids=ids).logits
        assert (logits - reference_logits(config, state, ids)).abs().max() < 1e-4


def test_left_padding_changes_nothing(tmp_path):
    config = original_config(padded_vocab_size=160, num_layers=2)
    model = load(write_checkpoint(tmp_path, config, random_state(config, 3)), dtype=torch.float32)
    ids = torch.randint(3, 160, (1, 9), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(14) >= 5).long()[None]
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        batched = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert (alone - batched).abs().max() < 1e-4


SIX_B = {
    "num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_group_num": 2, "padded_vocab_size": 65024, "seq_length": 8192,
}  # fmt: skip
NINE_B = {**SIX_B, "num_layers": 40, "padded_vocab_size": 151552, "seq_length": 131072, "rope_ratio": 500}


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    # The totals that people's logs of the original code show ("all params" less the adapter's).
    [("THUDM/chatglm3-6b", SIX_B, 6_243_584_000), ("THUDM/glm-4-9b-chat", NINE_B, 9_399_951_360)],
)
def test_published_sizes(name, sizes, parameters):
    source = original_config(_name_or_path=name, **sizes)
    config = glm_config(source, name)
    assert sum(math.prod(shape) for shape in original_shapes(config, Fused.of(source)).values()) == parameters
    with torch.device("meta"):
        assert GlmForCausalLM(config).num_parameters() == parameters


def test_config_is_mapped_explicitly():
    config = glm_config(original_config(), "x")
    assert config.model_type == "glm"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (1024, 64, 128)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (3, 4, 2)
    assert (config.head_dim, config.max_position_embeddings) == (16, 256)
    assert config.rms_norm_eps == 1e-5  # GlmConfig's default is GLM-4's 1.5625e-7
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 2, None)
    assert config.attention_bias
    assert not config.tie_word_embeddings
    # eos and pad are set even where the checkpoint leaves them out
    plain = glm_config(original_config(pad_token_id=None, eos_token_id=None), "x")
    assert (plain.pad_token_id, plain.eos_token_id) == (0, 2)


def test_rope_ratio_is_read_by_name():
    def parameters(ratio, name, folder="x", rope=None):
        return glm_config(original_config(rope_ratio=ratio, _name_or_path=name), folder, rope).rope_parameters

    larger = {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5}
    interpolated = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 50.0, "partial_rotary_factor": 0.5}
    assert parameters(50, "THUDM/chatglm3-6b-32k") == larger
    assert parameters(50, "THUDM/glm-4-9b-chat") == larger
    assert parameters(50, "THUDM/chatglm2-6b-32k") == interpolated
    assert parameters(50, "", "/models/ChatGLM2-6B-32k") == interpolated
    assert parameters(50, "my-model", "my-folder", "default") == larger
    assert parameters(50, "my-model", "my-folder", {"rope_type": "linear"}) == interpolated
    assert parameters(1, "my-model") == {**larger, "rope_theta": 10000.0}
    assert parameters(50, "x", "/cache/models--THUDM--chatglm2-6b-32k/snapshots/abc") == interpolated
    assert parameters(50, "x", "/experiments/chatglm2-copies/chatglm3-32k") == larger
    for name, folder in (("my-model", "my-folder"), ("chatglm2-and-chatglm3", "x")):
        with pytest.raises(UserError, match=r"rope_ratio: 50 is a larger RoPE base.*model\.rope_scaling"):
            parameters(50, name, folder)
    with pytest.raises(UserError, match="'yarn' is neither default nor linear"):
        parameters(50, "THUDM/chatglm3-6b", "x", "yarn")


REFUSED = {
    "rmsnorm": (False, "LayerNorm instead of RMSNorm"),
    "add_bias_linear": (True, "biases on every linear layer"),
    "apply_residual_connection_post_layernorm": (True, "residuals taken after the norm"),
    "post_layer_norm": (False, "no norm after the last layer"),
    "fp32_residual_connection": (True, "residuals in float32"),
    "original_rope": (False, "another rotary embedding"),
    "hidden_dropout": (0.1, "dropout on the residuals"),
    "pre_seq_len": (128, r"P-Tuning v2 prefix.*adapter\.method"),
    "quantization_bit": (4, r"vendor's own INT4/INT8.*chatglm3-6b.*model\.quantization: int4"),
    "quantization_config": ({"quant_method": "gptq"}, r"quantized weights.*model\.quantization: int4"),
    "tie_word_embeddings": (True, "embeddings tied"),
    "vision_config": ({"hidden_size": 8}, r"vision tower.*glm-4-9b-chat"),
    "multi_query_group_num": (None, "needed with multi_query_attention"),
    "num_layers": (None, "not in config.json"),
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_what_the_native_network_cannot_express_is_refused(key):
    value, reason = REFUSED[key]
    with pytest.raises(UserError, match=reason) as error:
        glm_config(original_config(**{key: value}), "some/folder")
    [problem] = error.value.problems
    assert problem.key == key
    assert problem.path == "some/folder"
    assert error.value.exit_code == 2


def test_all_reasons_are_named_at_once():
    with pytest.raises(UserError) as error:
        glm_config(original_config(rmsnorm=False, quantization_bit=4, pre_seq_len=8), "x")
    assert {problem.key for problem in error.value.problems} == {"rmsnorm", "quantization_bit", "pre_seq_len"}


def test_layout_is_told_by_model_type():
    assert layout_of(original_config()) is LAYOUTS["chatglm"]
    assert layout_of({"model_type": "glm"}) is LAYOUTS[""]
    assert layout_of({}) is LAYOUTS[""]


def small(tmp_path, change=None, **keys):
    config = original_config(padded_vocab_size=64, num_layers=1, **keys)
    state = random_state(config, 0)
    if change:
        change(state)
    return write_checkpoint(tmp_path, config, state)


LAYER = "transformer.encoder.layers.0."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(LAYER + "mlp.dense_4h_to_h.weight"), r"mlp\.dense_4h_to_h\.weight: missing weight"),
        (lambda s: s.pop(LAYER + "self_attention.query_key_value.bias"), r"query_key_value\.bias: missing weight"),
        (lambda s: s.update({"extra.weight": torch.ones(1)}), r"extra\.weight: unexpected weight"),
        (
            lambda s: s.update({LAYER + "mlp.dense_h_to_4h.weight": torch.ones(8, 64)}),
            r"mlp\.dense_h_to_4h\.weight: shape \(8, 64\), config\.json means \(256, 64\)",
        ),
        (
            lambda s: s.update({LAYER + "self_attention.dense.weight_scale": torch.ones(1)}),
            r"model\.quantization: int4",
        ),
        (lambda s: s.update({"transformer.prefix_encoder.embedding.weight": torch.ones(1)}), r"train adapter\.method"),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_wrong_weights_are_an_error(tmp_path, change, message, quantized):
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if quantized else {}
    with pytest.raises(UserError, match=message):
        load(small(tmp_path, change), dtype=torch.float32, **options)


def test_missing_files_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    folder = small(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors, no pytorch_model\.bin"):
        load(folder)
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"pytorch_model-00001-of-00001\.bin: named in .* but not there"):
        load(folder)


def test_a_hub_id_is_fetched_without_the_second_kind_of_weights(tmp_path, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"][-1]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    there = "model.safetensors.index.json"
    monkeypatch.setattr(
        "finetune.models.chatglm.weights.cached_file", lambda name, file, **_: file if file == there else None
    )
    assert fetch("THUDM/chatglm3-6b", "v1") == tmp_path
    monkeypatch.setattr("finetune.models.chatglm.weights.cached_file", lambda name, file, **_: None)
    assert fetch("THUDM/chatglm2-6b") == tmp_path
    assert asked == [("THUDM/chatglm3-6b", "v1", "*.safetensors"), ("THUDM/chatglm2-6b", None, "*.bin")]
    assert fetch(str(tmp_path)) == tmp_path  # a folder is used as it is

    def fail(*_, **__):
        raise OSError("no connection\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot be had from the hub \(no connection\)"):
        fetch("THUDM/chatglm2-6b")


def test_pickles_with_code_are_not_run(tmp_path):
    folder = small(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.output_layer.weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: more than weights: pickled code is never run"):
        load(folder)


def test_the_checkpoints_own_code_is_not_run(tmp_path):
    folder = small(tmp_path)
    for file in ("modeling_chatglm.py", "configuration_chatglm.py", "tokenization_chatglm.py"):
        (folder / file).write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    assert type(load(folder, dtype=torch.float32)) is GlmForCausalLM


# bitsandbytes on CPU: a fallback to plain torch (no `kernels` package) and a cast of the inputs, both announced.
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast", "ignore:.*gemm_4bit", "ignore:.*kernels")
@pytest.mark.parametrize("case_name", ["chatglm3", "chatglm3_mha"])
@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    ],
    ids=["int8", "nf4"],
)
def test_quantizing_while_loading_equals_quantizing_the_converted_layout(tmp_path, case_name, quantization):
    source = FIXTURES / case_name / "checkpoint"
    exact = load(source, dtype=torch.float32)
    exact.save_pretrained(tmp_path)
    options = {"quantization_config": BitsAndBytesConfig(**quantization), "dtype": torch.float32}
    ours = load(source, **options, device_map="cpu")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, **options, device_map="cpu")
    assert type(ours) is GlmForCausalLM
    ids = torch.arange(3, 40)[None]
    for module in (*ours.modules(), *converted.modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # The packed AVX512 kernel wants multiples of 32 rows, which the smallest fixture does not have.
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        a, b, c = (model(input_ids=ids).logits for model in (ours, converted, exact))
    assert torch.equal(a, b)
    assert 1e-3 < (a - c).abs().mean() < c.std()  # really quantized, and still this model


def test_half_precision_and_device_map(tmp_path):
    model = load(small(tmp_path), dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.get_input_embeddings().weight.shape[0] == 64  # padded_vocab_size, never resized


def test_layers_can_be_offloaded_to_disk(tmp_path):
    source = FIXTURES / "chatglm3" / "checkpoint"
    places = dict.fromkeys(["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"], "cpu")
    places |= dict.fromkeys(["model.layers.0", "model.layers.2", "lm_head"], "disk")
    offloaded = load(source, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(input_ids=ids).logits, load(source, dtype=torch.float32)(input_ids=ids).logits)
    with pytest.raises(UserError, match="weights are offloaded"):
        export_original(offloaded, read_config(source), tmp_path / "out")


def test_a_changed_config_is_used(tmp_path):
    folder = small(tmp_path)
    config = glm_config(read_config(folder), folder)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 12345.0}
    assert load(folder, config, dtype=torch.float32).model.rotary_emb.config.rope_parameters["rope_theta"] == 12345.0


@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_rows_split_and_join(interleaved):
    fused = Fused(heads=4, groups=4 if interleaved else 2, head_dim=3, interleaved=interleaved)
    for tensor in (torch.randn(sum(fused.rows), 5), torch.randn(sum(fused.rows))):
        q, k, v = fused.split(tensor)
        assert [len(q), len(k), len(v)] == list(fused.rows)
        assert torch.equal(fused.join(q, k, v), tensor)
    with pytest.raises(UserError, match="query_key_value has 7 rows"):
        fused.split(torch.randn(7))


def test_glm_checkpoints_with_native_names_load_in_plain_transformers(tmp_path):
    """The published -hf checkpoints (THUDM/glm-4-9b-chat-hf, model_type glm) need nothing of this module."""
    source = FIXTURES / "chatglm3" / "checkpoint"
    load(source, dtype=torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "glm"
    assert layout_of(config) is LAYOUTS[""]
    assert all(name.startswith(("model.", "lm_head.")) for name in load_file(tmp_path / "model.safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is GlmForCausalLM


def test_stored_inv_freq_is_optional(tmp_path):
    folder = small(tmp_path)
    state = load_file(folder / "model.safetensors")
    with_buffer = load(folder, dtype=torch.float32).state_dict()
    del state["transformer.rotary_pos_emb.inv_freq"]
    shutil.rmtree(folder / "again", ignore_errors=True)
    (folder / "again").mkdir()
    shutil.copy(folder / "config.json", folder / "again")
    save_file(state, folder / "again" / "model.safetensors", {"format": "pt"})
    without = load(folder / "again", dtype=torch.float32).state_dict()
    assert all(torch.equal(with_buffer[name], without[name]) for name in with_buffer)
