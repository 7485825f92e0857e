"""The shipped tiny bases: plain folders, small, and made of what the package can make again."""

from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.builtin.tokenizers import CHAT_TEMPLATE, build_tokenizer
from finetune.builtin.world import HAN, documents
from finetune.models import tokenizers
from finetune.recipe.sections import ModelConfig
from finetune.resources import BUILTIN_MODELS

BASES = sorted(p for p in BUILTIN_MODELS.iterdir() if p.is_dir())
PLAIN = [p for p in BASES if (p / "tokenizer.json").exists()]  # tiny-chatglm3 is in ChatGLM3's own layout


def tokenizer_of(folder):
    return tokenizers.load_tokenizer(ModelConfig(name=folder.name))


def size(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def test_all_bases_together_stay_small():
    assert BASES
    assert all(size(folder) <= 3_900_000 for folder in BASES)


@pytest.mark.parametrize("folder", PLAIN, ids=lambda p: p.name)
def test_a_base_is_a_plain_small_model(folder):
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) <= 1_900_000
    assert config.tie_word_embeddings
    assert not any(n % 64 for n in (config.hidden_size, config.intermediate_size, config.vocab_size))
    assert model.generation_config.eos_token_id == tokenizer_of(folder).eos_token_id


@pytest.mark.parametrize("folder", PLAIN, ids=lambda p: p.name)
def test_the_tokenizer_is_the_one_the_world_gives(folder):
    shipped = tokenizer_of(folder)
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Tara paid 1,024.50 yuan;\nfor order ZX90817 (杭州)"
    assert shipped.encode(text) == stored.encode(text).ids  # AutoTokenizer splits it otherwise on a qwen2 model
    built = build_tokenizer(islice(documents(0, 8_000), 8_000), HAN)
    assert shipped.get_vocab() == built.get_vocab()
    assert shipped.chat_template == CHAT_TEMPLATE
    assert shipped.pad_token_id == built.pad_token_id


@pytest.mark.parametrize("folder", PLAIN, ids=lambda p: p.name)
def test_the_base_knows_the_world_and_tells_the_chat_markers_apart(folder):
    tokenizer = tokenizer_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = list(islice(documents(99, 1), 20))
    losses = []
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < 1.5  # ln(1024) = 6.9
    a, b = model.get_input_embeddings().weight[
        [tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id]
    ]
    assert torch.cosine_similarity(a, b, dim=0).abs() < 0.5
