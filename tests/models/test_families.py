"""Every family through the same door: strict loading, training, saving, batched generation, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families_tiny as tiny
import family_checks
import pytest
import torch
from family_checks import Checkpoint, damaged
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune import families
from finetune.adapters.load import apply
from finetune.errors import UserError
from finetune.models import attach
from finetune.models.config import read_config
from finetune.recipe.adapters import LoraAdapter
from finetune.recipe.sections import ModelConfig


@pytest.fixture(scope="module", params=tiny.NETWORKS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("families") / request.param, request.param)


def config_of(folder: Path, **keys: Any) -> ModelConfig:
    return Checkpoint(folder).config(**keys)


def load(folder: Path, **keys: Any) -> Any:
    return Checkpoint(folder).load(**keys)


def test_weights_arrive_bit_for_bit(checkpoint: Path) -> None:
    family_checks.arrives(Checkpoint(checkpoint))


def test_lora_learns_is_saved_and_merges(checkpoint: Path) -> None:
    family_checks.learns(Checkpoint(checkpoint))


def test_batched_generation_equals_one_by_one(checkpoint: Path) -> None:
    family_checks.writes_alike(Checkpoint(checkpoint))
    family_checks.pads(Checkpoint(checkpoint))


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_wrong_weights_are_an_error(checkpoint: Path, kind: str) -> None:
    family_checks.refuses(Checkpoint(checkpoint), [kind])


@pytest.mark.parametrize("quantization", ["int4", "int8"])
@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_and_where_they_are_quantized_while_loading(tmp_path: Path, kind: str, quantization: str) -> None:
    folder = tiny.write(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256)
    load(folder, quantization=quantization)
    with pytest.raises(UserError, match=kind):
        load(damaged(folder, tmp_path / "damaged", kind), quantization=quantization)


def test_a_missing_head_is_an_error_only_where_it_is_not_tied(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path / "headless", "unexpected")
    state = load_file(checkpoint / "model.safetensors")
    tied = not any(key.startswith(("lm_head", "embed_out")) for key in state)
    save_file({k: v for k, v in state.items() if "lm_head" not in k}, folder / "model.safetensors", {"format": "pt"})
    if tied:
        assert torch.equal(load(folder).lm_head.weight, load(checkpoint).lm_head.weight)
    else:
        with pytest.raises(UserError, match="missing weight"):
            load(folder)


def test_tied_and_untied_heads(tmp_path: Path) -> None:
    tied = load(tiny.write(tmp_path / "tied", "qwen2-tied"))
    untied = load(tiny.write(tmp_path / "untied", "qwen2"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_buffers_that_old_checkpoints_stored_are_no_error(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "old", "llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    load(folder)


def write_config(folder: Path, **config: Any) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelConfig(name=str(folder))


REFUSED = {
    "ChatGLM-6B": ({"model_type": "chatglm", "position_encoding_2d": True, "inner_hidden_size": 16}, "chatglm3-6b"),
    "GLM-10B": ({"model_type": "glm", "architectures": ["GLMModel"], "num_layers": 4}, "chatglm3-6b"),
    "BERT": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "causal model"),
    "T5": ({"model_type": "t5", "is_encoder_decoder": True}, "causal model"),
    "mT5": ({"model_type": "mt5"}, "causal model"),
    "other encoder-decoder": ({"model_type": "nllb-moe", "is_encoder_decoder": True}, "causal model"),
    "Baichuan-13B": ({"model_type": "baichuan", "hidden_size": 5120, "model_max_length": 4096}, "Baichuan2-7B"),
    "BlueLM": ({"model_type": "BlueLM", "auto_map": {"AutoConfig": "configuration_bluelm.BlueLMConfig"}}, "Qwen2.5"),
    "Qwen-7B": ({"model_type": "qwen"}, "Qwen1.5"),
    "remote code": ({"model_type": "mymodel", "auto_map": {"AutoModel": "modeling.MyModel"}}, "never run"),
    "an image model": ({"model_type": "vit"}, "causal model"),
    "no model_type": ({"hidden_size": 8}, "model_type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_reason_and_what_to_use_instead(tmp_path: Path, name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        read_config(write_config(tmp_path / "model", **config))
    assert len(caught.value.lines()) == 1
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    "name",
    ["THUDM/chatglm-6b", "THUDM/chatglm-6b-int4", "THUDM/glm-130b", "google-bert/bert-base-chinese",
     "hfl/chinese-roberta-wwm-ext", "google/mt5-small", "baichuan-inc/Baichuan-13B-Chat", "vivo-ai/BlueLM-7B-Chat",
     "Qwen/Qwen-7B-Chat", "internlm/internlm2-chat-7b"],
)  # fmt: skip
def test_refused_by_name_before_anything_is_downloaded(name: str) -> None:
    with pytest.raises(UserError, match="use "):
        read_config(ModelConfig(name=name))


@pytest.mark.parametrize(
    "name",
    ["THUDM/chatglm3-6b", "THUDM/chatglm2-6b", "Qwen/Qwen1.5-7B", "Qwen/Qwen2.5-7B", "baichuan-inc/Baichuan2-7B-Chat",
     "THUDM/glm-4-9b-chat-hf", "openai-community/gpt2", "internlm/internlm3-8b-instruct"],
)  # fmt: skip
def test_names_that_load_are_not_refused(name: str) -> None:
    assert families.refused_name(name) is None


def test_an_adapter_of_plain_peft_goes_on_any_family(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "base", "gpt2")
    apply(load(folder), LoraAdapter(r=2)).save_pretrained(tmp_path / "adapter")
    assert isinstance(attach.attach_adapter(load(folder), tmp_path / "adapter", config_of(folder)), PeftModel)
