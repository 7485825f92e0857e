"""Every family through the same door: strict loading, training, saving, batched generation, merging."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import families_tiny as tiny
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune import families
from finetune.adapters.load import apply
from finetune.adapters.merge import largest_difference, logits_of, merge_in_float32
from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.evaluation.generation import generate, left_pad
from finetune.models import attach, loading, tokenizers
from finetune.models.config import read_config
from finetune.recipe.adapters import LoraAdapter
from finetune.recipe.sections import ModelConfig

TEXTS = ["say 7", "tell me about the weather 天气", "a", "订单号 A7301 在哪里？"]


@pytest.fixture(scope="module", params=tiny.NETWORKS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("families") / request.param, request.param)


def config_of(folder: Path, **keys: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), **{"sanity_check": False, **keys})


def load(folder: Path, **keys: Any) -> Any:
    return loading.load_model(config_of(folder, **keys), torch.float32)


def samples_of(folder: Path) -> tuple[Any, list[list[int]]]:
    config = config_of(folder)
    encoder = make_encoder(tokenizers.load_tokenizer(config), families.family(read_config(config)["model_type"]))
    return encoder, [encoder.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS]


def test_weights_arrive_bit_for_bit(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours, plain = load(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert type(ours) is type(plain)
    state = ours.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert not ours.training


def test_lora_learns_is_saved_and_merges(checkpoint: Path, tmp_path: Path) -> None:
    _, samples = samples_of(checkpoint)
    model = apply(load(checkpoint), LoraAdapter(r=4, lora_alpha=8))
    ids = torch.tensor([samples[1]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    unmerged = logits_of(model, samples)
    model.save_pretrained(tmp_path)

    again = attach.attach_adapter(load(checkpoint), tmp_path, config_of(checkpoint))
    assert largest_difference(unmerged, logits_of(again, samples))[0] == 0.0
    with again.disable_adapter():
        assert largest_difference(logits_of(load(checkpoint), samples), logits_of(again, samples))[0] == 0.0
    difference, _ = largest_difference(unmerged, logits_of(merge_in_float32(again), samples))
    assert difference < 1e-4
    assert largest_difference(unmerged, logits_of(load(checkpoint), samples))[0] > 100 * difference


def test_batched_generation_equals_one_by_one(checkpoint: Path) -> None:
    encoder, samples = samples_of(checkpoint)
    model = load(checkpoint)
    together = generate(model, encoder, samples, max_new_tokens=12, batch_size=4)
    assert together == generate(model, encoder, samples, max_new_tokens=12, batch_size=1)
    # A random model may say the same to everything; the logits of padded rows may not.
    ids, mask = left_pad(samples, encoder.tokenizer.pad_token_id, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate makes them
    kinds = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask, **kinds).logits[:, -1]
    alone = torch.stack([rows[-1] for rows in logits_of(model, samples)])
    assert (padded - alone).abs().max() < 1e-4 * alone.abs().max()


def damaged(checkpoint: Path, folder: Path, kind: str) -> Path:
    """A copy with one matrix of the first block taken away, cut, or added."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(checkpoint / "model.safetensors")
    name = next(key for key, value in state.items() if value.ndim == 2 and ".0." in key and "expert" not in key)
    if kind == "missing":
        state.pop(name)
    elif kind == "misshapen":
        state[name] = state[name][:-1].contiguous()
    else:
        state[name.replace(".0.", ".7.")] = state[name].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_wrong_weights_are_an_error(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=kind):
        load(damaged(checkpoint, tmp_path / "damaged", kind))


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
        with pytest.raises(UserError, match="missing weights"):
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
