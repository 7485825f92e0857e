"""Converted files against llama.cpp itself, where it is installed: tokens, and logits under every kind of scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from finetune.models import sources
from finetune.models.gguf import checks, tokenizer
from finetune.models.gguf.header import read_header
from finetune.recipe.sections import ModelConfig

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
from gguf_tiny import CONTROL, NORMAL, random_llama, write  # noqa: E402

TEXTS = (
    "Hello world", "The year 1024,  costs 12345.67 (see 3.14)!", "  leading\n\n\ttab and\r\n newline   ", " x", "\n",
    "北京的水壶,王小明 250元。", "it's we'll I'VE don't DON'T",
    "naïve café — “quotes” 🙂👩‍👩‍👧", "def f(x):\n    return x**2\n\n\n",
    "<|im_start|>user\nhi<|im_end|>", "हिन्दी العربية", "a" * 9 + " " * 7 + "b", "１２３ ½ ²", "word 1 22 333 4444",
)  # fmt: skip


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("finetune.models.gguf.cache.cache_folder", lambda: tmp_path / "cache")
    return tmp_path


def folder(path: Path) -> Path:
    return sources.folder(ModelConfig(name=str(path)))


def other(path: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False, **options)


# llama.cpp leaves combining marks out of these expressions; transformers has them as their models' tokenizer.json do.
WITHOUT_MARKS = {"gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie", "tekken"}


@pytest.fixture(scope="module")
def crossing() -> tuple[list[str], list[str]]:
    """Tokens and merges of a vocabulary that joins what pre-tokenizers keep apart: each splits TEXTS its own way."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=alphabet, show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([*TEXTS] * 2, trainer)
    made = json.loads(backend.to_str())["model"]
    return sorted(made["vocab"], key=made["vocab"].get), [" ".join(merge) for merge in made["merges"]]


@pytest.mark.parametrize(
    "pre", sorted(checks.GPT2_SPLITS | checks.DIGIT_SPLITS | checks.NUMBER_SPLITS | set(GGUF_PRE_TOKENIZER_SPLITS))
)
def test_the_same_tokens(pre: str, tmp_path: Path, crossing: tuple[list[str], list[str]]) -> None:
    tokens, merges = crossing
    meta = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "llama.vocab_size": len(tokens)}
    meta["tokenizer.ggml.token_type"] = [CONTROL if number < 4 else NORMAL for number in range(len(tokens))]
    meta["tokenizer.ggml.add_bos_token"] = None
    path = write(tmp_path / "model.gguf", random_llama(num_hidden_layers=1), pre=pre, meta=meta)
    where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "model.gguf"}
    ours, theirs = tokenizer.rebuild(where, read_header(path)), other(path, vocab_only=True)
    for text in TEXTS:
        if pre in WITHOUT_MARKS and "हि" in text:
            continue
        assert ours(text)["input_ids"] == theirs.tokenize(text.encode(), add_bos=True, special=True), text


def logits(path: Path, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, llama.cpp's)"""
    model = AutoModelForCausalLM.from_pretrained(folder(path), dtype=torch.float32)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    theirs = other(path, logits_all=True, type_k=F32, type_v=F32)
    theirs.eval(ids)
    return ours, torch.tensor(np.array(theirs.scores[: len(ids)]))


F32 = 0  # of the cache, in ggml's numbers
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
}


@pytest.mark.parametrize("kind", SCALED)
def test_the_same_logits(kind: str, cached: Path) -> None:
    said, config = SCALED[kind]
    path = write(cached / "x.gguf", random_llama(), meta={f"llama.{key}": value for key, value in said.items()})
    ids = torch.randint(4, 1024, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    ours, theirs = logits(path, ids)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    assert config.items() <= AutoModelForCausalLM.from_pretrained(folder(path)).config.rope_parameters.items()


def test_llama_3_frequencies(cached: Path) -> None:
    """The file holds what every frequency is divided by; config.json the rule that gives it."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = random_llama(rope_parameters=rope)
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq).float().numpy()
    path = write(cached / "x.gguf", model, tensors={"rope_freqs.weight": factors})
    ids = torch.randint(4, 1024, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    ours, theirs = logits(path, ids)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
