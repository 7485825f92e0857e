"""Random checkpoints in ChatGLM's original layout, and a small forward pass of the published architecture.

Written from the architecture, sharing no code with finetune/models/chatglm.py or transformers' Glm: rotation of
neighbouring pairs over the first half of each head, grouped keys and values, RMSNorm before each block, silu(a) * b.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parents[1] / "fixtures" / "chatglm"
CASES = ("chatglm3", "chatglm3_ratio50", "chatglm3_mha")


def original_config(**changes: Any) -> dict[str, Any]:
    config = json.loads((FIXTURES / "chatglm3" / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    return {**config, **changes}


def random_state(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights of the published layout, large enough for every part to matter in the logits."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * scale

    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["kv_channels"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    rows, inner, vocab = (heads + 2 * groups) * width, config["ffn_hidden_size"], config["padded_vocab_size"]
    state = {
        "transformer.embedding.word_embeddings.weight": normal(vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": 1.0 / 10000 ** (torch.arange(0, width // 2, 2) / (width // 2)),
        "transformer.encoder.final_layernorm.weight": 1 + normal(hidden, scale=0.2),
        "transformer.output_layer.weight": normal(vocab, hidden, scale=hidden**-0.5),
    }
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}."
        state[layer + "input_layernorm.weight"] = 1 + normal(hidden, scale=0.2)
        state[layer + "post_attention_layernorm.weight"] = 1 + normal(hidden, scale=0.2)
        state[layer + "self_attention.query_key_value.weight"] = normal(rows, hidden, scale=2 * hidden**-0.5)
        if config["add_qkv_bias"]:
            state[layer + "self_attention.query_key_value.bias"] = normal(rows, scale=0.5)
        state[layer + "self_attention.dense.weight"] = normal(hidden, heads * width, scale=hidden**-0.5)
        state[layer + "mlp.dense_h_to_4h.weight"] = normal(2 * inner, hidden, scale=hidden**-0.5)
        state[layer + "mlp.dense_4h_to_h.weight"] = normal(hidden, inner, scale=inner**-0.5)
    return state


def write_checkpoint(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def reference_logits(
    config: dict[str, Any], state: dict[str, torch.Tensor], ids: torch.Tensor, interpolate: bool = False
) -> torch.Tensor:
    """[batch, length] ids -> [batch, length, vocabulary] logits, without padding, positions from 0."""
    heads, width, ratio = config["num_attention_heads"], config["kv_channels"], config.get("rope_ratio", 1)
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    batch, length = ids.shape
    rotated = width // 2  # dimensions of each head that carry positions
    base = 10000 * (1 if interpolate else ratio)
    position = torch.arange(length) / (ratio if interpolate else 1)
    angle = position[:, None] / base ** (torch.arange(0, rotated, 2) / rotated)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [length, 1, pairs]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x[..., :rotated].reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., rotated:]], -1)

    x = state["transformer.embedding.word_embeddings.weight"][ids]
    for index in range(config["num_layers"]):
        layer = {k.split(f"layers.{index}.")[1]: v for k, v in state.items() if f".layers.{index}." in k}
        mixed = norm(x, layer["input_layernorm.weight"]) @ layer["self_attention.query_key_value.weight"].T
        mixed = mixed + layer.get("self_attention.query_key_value.bias", torch.zeros(()))
        if config["multi_query_attention"]:
            mixed = mixed.reshape(batch, length, -1, width)
            q, k, v = mixed[:, :, :heads], mixed[:, :, heads : heads + groups], mixed[:, :, heads + groups :]
        else:  # per head [q, k, v]
            q, k, v = mixed.reshape(batch, length, heads, 3, width).unbind(3)
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // groups, 2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, length, -1)
        x = x + attended @ layer["self_attention.dense.weight"].T
        a, b = (norm(x, layer["post_attention_layernorm.weight"]) @ layer["mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        x = x + (a * a.sigmoid() * b) @ layer["mlp.dense_4h_to_h.weight"].T
    x = norm(x, state["transformer.encoder.final_layernorm.weight"])
    return x @ state["transformer.output_layer.weight"].T
