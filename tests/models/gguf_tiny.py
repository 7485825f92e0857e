"""Small GGUF files of Llama networks, written with the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.resources import BUILTIN_MODELS

TINY = BUILTIN_MODELS / "tiny-llama"
CONTROL, NORMAL = 3, 1
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def random_llama(**more: Any) -> LlamaForCausalLM:
    """Grouped queries, and weights large enough to tell apart."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | more)).eval()


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order: pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def write(
    path: Path, model: LlamaForCausalLM | None = None, kind: str = "F32", *, arch: str = "llama",
    meta: dict[str, Any] | None = None, tensors: dict[str, np.ndarray] | None = None, pre: str | None = "gpt-2",
) -> Path:  # fmt: skip
    """The built-in tiny-llama, or `model` with its tokenizer; `meta` and `tensors` are added, None takes away."""
    network = model or LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config, meta = network.config, meta or {}
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]), "vocab_size": config.vocab_size,
    }  # fmt: skip
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    every = {f"{arch}.{key}": value for key, value in values.items()} | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if n < 4 else NORMAL for n in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(m) for m in tokenizer["merges"]], "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 3, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (TINY / "chat_template.jinja").read_text(), "general.license": "apache-2.0",
    }  # fmt: skip
    for key, value in (every | meta).items():
        put(writer, key, value)
    weights = {renamed(name): tensor.numpy() for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("output.weight", None)
    for name, weight in (weights | (tensors or {})).items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = turned(weight, heads)
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        data = gguf.quants.quantize(weight, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None or key == "general.architecture":
        return
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)


# --- beside llama.cpp ---


def prompt_of(tokenizer: Any, other: Any, question: str) -> list[int]:
    """Ids of a question in the chat format; llama.cpp (`other`) makes the same of its text."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert other.tokenize(text.encode(), add_bos=True, special=True) == ids
    return ids


def said(model: Any, tokenizer: Any, other: Any, ids: list[int], most: int) -> tuple[str, str]:
    """The greedy answers of transformers and of llama.cpp."""
    with torch.no_grad():
        answer = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=most, do_sample=False)[0, len(ids) :]
    theirs = other.create_completion(ids, max_tokens=most, temperature=0)["choices"][0]["text"]
    return tokenizer.decode(answer.tolist(), skip_special_tokens=True), theirs
