"""Every family's turns end with its own token, which is trained, stops generation, and goes into merged models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families_tiny as tiny
import pytest
import torch
from conftest import make_tokenizer

from finetune.data.chat import make_encoder
from finetune.data.types import Conversation
from finetune.evaluation.generation import generate, stop_ids
from finetune.families import family
from finetune.models import loading, tokenizers
from finetune.recipe.sections import ModelConfig
from finetune.resources import resource_path

# model_type, template, the tokens it needs, the token that ends a turn
TURNS = [
    ("llama", "llama2", ["<s>", "</s>"], "</s>"),
    ("llama", "llama3",
     ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"], "<|eot_id|>"),
    ("qwen2", "qwen2_5", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    ("qwen3", "qwen3", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    ("gemma", "gemma", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    ("phi3", "phi3", ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "<|end|>"),
    ("mistral", "mistral", ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
    ("baichuan", "baichuan2", ["<s>", "</s>", "<reserved_106>", "<reserved_107>"], "</s>"),
]  # fmt: skip
EOS = {"llama3": "<|end_of_text|>", "gemma": "<eos>", "phi3": "<|endoftext|>", "qwen3": "<|im_end|>"}


def tokenizer_for(template: str, tokens: list[str]) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = EOS.get(template, "</s>" if "</s>" in tokens else "<|im_end|>")
    tokenizer.bos_token = next((t for t in tokens if t in ("<s>", "<bos>", "<|begin_of_text|>")), None)
    path = resource_path("data_templates", "chat_templates", f"{template}.jinja")
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.parametrize(("kind", "template", "tokens", "end"), TURNS, ids=[row[1] for row in TURNS])
def test_the_end_of_a_turn_is_trained_and_stops(
    kind: str, template: str, tokens: list[str], end: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_for(template, tokens)
    encoder = make_encoder(tokenizer, family(kind))
    number = tokenizer.convert_tokens_to_ids(end)
    assert number in encoder.stop_ids
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    encoded = encoder.encode(Conversation(messages, None))
    trained = [label for label in encoded.labels if label != -100]
    assert number in trained  # else the model never learns to stop

    folder = tiny.write(tmp_path / "model", "llama", vocab_size=len(tokenizer))
    model = loading.load_model(ModelConfig(name=str(folder), sanity_check=False), torch.float32)
    prompt = encoder.prompt_ids(messages[:1])
    free = generate(model, encoder, [prompt], max_new_tokens=8, batch_size=1)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[number] = 1e4  # a model that ends its turn at once
    assert generate(model, encoder, [prompt], max_new_tokens=8, batch_size=1) == [""]
    assert free != [""]


def test_the_bases_own_ends_stop_too(tmp_path: Path) -> None:
    """Llama 3 has three, of which the template shows one; GLM-4-0414 ends with the next turn's role."""
    folder = tiny.write(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77, 78]}))
    config = ModelConfig(name=str(folder), sanity_check=False)
    model = loading.load_model(config, torch.float32)
    encoder = make_encoder(tokenizers.load_tokenizer(config), family("llama"))
    assert encoder.stop_ids == [2]
    assert stop_ids(model, encoder) == [2, 77, 78]
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[77] = 1e4
    assert generate(model, encoder, [[5, 6, 7]], max_new_tokens=4, batch_size=1) == [""]


def test_padding_is_never_the_end(tmp_path: Path) -> None:
    """pad == eos hides the end from the loss in many trainers; Llama has no pad token at all."""
    folder = tiny.write(tmp_path / "model", "llama")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    for pad in (None, "<|im_end|>"):
        (folder / "tokenizer_config.json").write_text(json.dumps({**values, "pad_token": pad}))
        tokenizer = tokenizers.load_tokenizer(ModelConfig(name=str(folder)))
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
        assert tokenizer.padding_side == "left"
