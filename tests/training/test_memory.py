"""How many tokens go into a pass, for models whose peaks were measured, or are known to have run out of memory."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware, resolve
from finetune.training.memory import room

SMOLLM2 = {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152}
GEMMA3 = {"text_config": {"hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048, "vocab_size": 262144}}
CHATGLM3 = {"hidden_size": 4096, "num_layers": 28, "ffn_hidden_size": 13696, "padded_vocab_size": 65024}
LAPTOP, WORKSTATION = Hardware("cpu", False, 16.0), Hardware("cpu", False, 24.0)
CARD = Hardware("cuda", True, 24.0)


def recipe(stage: str = "sft", max_length: int = 512, **sections: Any) -> Any:
    values = {
        "version": 1, "stage": stage, "model": {"name": "m"}, "output": {"dir": "r"},
        "data": {"train": "d", "max_length": max_length}, **sections,
    }  # fmt: skip
    return check(values, stage)


def rows(config: dict[str, Any], machine: Hardware, **more: Any) -> int | None:
    """Rows of 512 tokens in a pass."""
    made = recipe(**more)
    found = room(made, config, machine)
    assert found is not None
    return resolve(
        made, Hardware(machine.device, machine.bf16, machine.memory_gb, room=found)
    ).train.per_device_train_batch_size


def test_what_one_pass_holds() -> None:
    """16 rows of 512 tokens of SmolLM2 took 11 to 15 GB without checkpointing: 24 GB are not one program's alone."""
    found = room(recipe(), SMOLLM2, WORKSTATION)
    assert found is not None
    assert 1_500 < found < 2_200, "about 3 MB a token, of 6 GB less the weights"
    assert rows(SMOLLM2, WORKSTATION) == 2
    assert rows(SMOLLM2, LAPTOP) == 2
    assert rows(SMOLLM2, LAPTOP, stage="dpo") == 1, "a pair is two sequences"


def test_a_large_vocabulary_counts() -> None:
    """The logits of a token of Gemma 3 are a megabyte, and four of them are there at once."""
    small = {"text_config": {**GEMMA3["text_config"], "vocab_size": 32_000}}
    few, many = room(recipe(), GEMMA3, CARD), room(recipe(), small, CARD)
    assert few is not None
    assert many is not None
    assert few < 12e9 / (4 * 4 * 262_144)
    assert many > 4 * few
    assert room(recipe(stage="reward"), GEMMA3, CARD) > few, "a score head has no vocabulary"  # type: ignore[operator]


def test_what_is_held_leaves_less_room() -> None:
    card = Hardware("cuda", True, 40.0)
    plain, four = (
        room(recipe(), CHATGLM3, card),
        room(recipe(model={"name": "m", "quantization": "int4"}), CHATGLM3, card),
    )
    kept = room(recipe(train={"gradient_checkpointing": False}), CHATGLM3, card)
    assert kept is not None
    assert plain is not None
    assert four is not None
    assert kept < plain < four
    assert room(recipe(adapter={"method": "full"}), CHATGLM3, card) == 1, (
        "6B and AdamW do not fit: what is left is one row"
    )


def test_all_experts_are_held_and_few_are_computed() -> None:
    """Of Qwen3-30B-A3B a token goes through 8 experts of 128; in int4 all of it takes 16 GB."""
    mixture = {
        "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    }  # fmt: skip
    int4 = recipe(model={"name": "m", "quantization": "int4"})
    assert room(int4, mixture, CARD) == 1, "half of 24 GB is less"
    large, dense = Hardware("cuda", True, 80.0), {**mixture, "num_experts_per_tok": None}
    assert room(int4, mixture, large) < room(int4, dense, large)  # type: ignore[operator]
    assert room(int4, mixture, large) > 1000  # type: ignore[operator]


BROKEN = ({"text_config": ["x"]}, {"num_experts_per_tok": [2, 4]}, {"intermediate_size": [None, 8]}, {"d_ff": "x"})


@pytest.mark.parametrize("more", BROKEN)
def test_odd_values_are_not_its_own_to_refuse(more: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    assert room(recipe(), {**sizes, **more}, CARD) is not None
    assert room(recipe(), {**sizes, "hidden_size": "many"}, CARD) is None


@pytest.mark.parametrize("config", [{}, {"hidden_size": 64}, {"hidden_size": 64, "num_hidden_layers": 2}])
def test_what_is_not_known(config: dict[str, Any]) -> None:
    assert room(recipe(), config, LAPTOP) is None


def test_small_models_keep_the_rule_of_thumb() -> None:
    tiny = {"hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512, "vocab_size": 4096}
    assert rows(tiny, WORKSTATION, train={"effective_batch_size": 32}) == 16
