"""Baichuan-7B and Baichuan2-7B: W_pack and the normalised head, undone while loading."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.adapters.merge import logits_of
from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.families import family
from finetune.models import baichuan, loading, tokenizers
from finetune.recipe.sections import ModelConfig

LINES = [f"hello world, this is order {i}: 你好 世界 订单号 {i * 7}" for i in range(300)]


def write_tokenizer(folder: Path, **options: Any) -> Path:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=buffer, minloglevel=2, hard_vocab_limit=False,
        **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 330, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, "split_digits": True, **options},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    return folder


def write_baichuan(folder: Path, vocabulary: int = 400, **changes: Any) -> LlamaForCausalLM:
    """A random checkpoint in Baichuan's layout; returns the Llama that it means."""
    write_tokenizer(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".q_proj" in name:
            parts = [model.state_dict()[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            state[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif ".k_proj" not in name and ".v_proj" not in name:
            state[name] = tensor.clone()
    for layer in range(2):  # as the published .bin files
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    published = {
        "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_baichuan.BaiChuanConfig"},
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-06, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    (folder / "configuration_baichuan.py").write_text("raise SystemExit('remote code ran')", encoding="utf-8")
    tokenizer = {"tokenizer_class": "BaiChuanTokenizer", "auto_map": {"AutoTokenizer": ["x.BaiChuanTokenizer", None]},
                 "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return model


def load(folder: Path) -> Any:
    return loading.load_model(ModelConfig(name=str(folder), sanity_check=False), torch.float32)


SAMPLES = [[5, 300, 17, 44, 9], [7, 7, 201]]


def test_baichuan_7b_computes_what_its_llama_computes(tmp_path: Path) -> None:
    meant = write_baichuan(tmp_path / "baichuan")
    model = load(tmp_path / "baichuan")
    assert type(model) is LlamaForCausalLM
    for ours, theirs in zip(logits_of(model, SAMPLES), logits_of(meant, SAMPLES), strict=True):
        assert torch.equal(ours, theirs)


def test_baichuan2_normalises_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baichuan, "SECOND", 401)
    meant = write_baichuan(tmp_path / "baichuan2", 401)
    model = load(tmp_path / "baichuan2")
    hidden = [meant.model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in SAMPLES]
    for ours, states in zip(logits_of(model, SAMPLES), hidden, strict=True):
        expected = states @ torch.nn.functional.normalize(meant.lm_head.weight).T  # rows of length one
        assert (ours - expected).abs().max() < 1e-5


def test_saved_as_a_stock_llama(tmp_path: Path) -> None:
    meant = write_baichuan(tmp_path / "baichuan")
    load(tmp_path / "baichuan").save_pretrained(tmp_path / "stock")
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert plain.config.model_type == "llama"
    assert torch.equal(logits_of(plain, SAMPLES)[0], logits_of(meant, SAMPLES)[0])


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.W_pack.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["missing", "unexpected", "misshapen"])
def test_wrong_weights_are_an_error(tmp_path: Path, name: str, kind: str) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "baichuan"
    write_baichuan(folder)
    state = load_file(folder / "model.safetensors")
    if kind == "missing":
        del state[name]
    elif kind == "misshapen":
        state[name] = state[name][:-3].contiguous()
    else:
        state["extra." + name] = state[name].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=kind):
        load(folder)


def test_tokenizer_without_its_code(tmp_path: Path) -> None:
    write_baichuan(tmp_path / "baichuan")
    tokenizer = tokenizers.load_tokenizer(ModelConfig(name=str(tmp_path / "baichuan")))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "baichuan" / "tokenizer.model"))
    texts = [*LINES[:20], "  two  spaces", "新的文本\n第二行", "<s> is text </s>"]
    assert tokenizer(texts[:-1])["input_ids"] == model.encode(texts[:-1])
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert make_encoder(tokenizer, family("baichuan")).stop_ids == [2]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_llama_derivatives_that_bring_only_a_sentencepiece_model(tmp_path: Path, dummy_prefix: bool) -> None:
    """transformers converts these with protobuf, and without it asks for tiktoken."""
    folder = write_tokenizer(tmp_path / "derivative", add_dummy_prefix=dummy_prefix)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    size = model.vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}), encoding="utf-8")
    tokenizer = tokenizers.load_tokenizer(ModelConfig(name=str(folder)))
    assert tokenizer("你好 world")["input_ids"] == [1, *model.encode("你好 world")]
    assert tokenizer.pad_token_id == size
    assert tokenizer.decode(tokenizer("你好 world")["input_ids"], skip_special_tokens=True) == "你好 world"
    tokenizer.save_pretrained(tmp_path / "saved")
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("a  b 你")["input_ids"] == tokenizer("a  b 你")["input_ids"]


def test_added_tokens_that_would_get_other_ids_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "derivative")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 9999}), encoding="utf-8")
    with pytest.raises(UserError, match="the checkpoint means 9999"):
        tokenizers.load_tokenizer(ModelConfig(name=str(folder)))


def test_baichuan2_chat_has_its_template(tmp_path: Path) -> None:
    folder = tmp_path / "baichuan"
    write_baichuan(folder)
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    added = {"<reserved_106>": size, "<reserved_107>": size + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    tokenizer = tokenizers.load_tokenizer(ModelConfig(name=str(folder)))
    encoder = make_encoder(tokenizer, family("baichuan"))
    ids = encoder.prompt_ids([{"role": "user", "content": "hello"}])
    assert (ids[0], ids[-1]) == (size, size + 1)
    assert encoder.stop_ids == [2]
