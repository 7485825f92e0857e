"""Continuous batches: a row that leaves or enters changes no answer, and what has ended is not computed further."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from finetune.evaluation import continuous
from finetune.evaluation.generation import Settings, answer, left_pad, up_to_stop, written
from finetune.rl.replies import Sampling, sample

PAD, WORDS, MOST = 1, 96, 40
STOPS = list(range(0, WORDS, 16))
SHAPE = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0}  # fmt: skip
draw = random.Random(0)
PROMPTS = [[draw.randrange(2, WORDS) for _ in range(draw.randint(1, 30))] for _ in range(24)]
HOW = {
    "greedy": Settings(),
    "drawn": Settings(temperature=1.0, seed=3),
    "drawn from few": Settings(temperature=0.7, top_k=20, top_p=0.9, seed=4),
    "repetition penalty": Settings(temperature=1.0, repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=PAD, initializer_range=0.2)).eval()


def together(model: Any, how: Settings, size: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for ended in written(model, prompts, MOST, size, STOPS, PAD, how):
        assert not found.keys() & dict(ended).keys()
        found |= dict(ended)
    return [found[i] for i in range(len(prompts))]


def alone(model: Any, how: Settings) -> list[list[int]]:
    """Each by one call of `generate`."""
    found = []
    for i, prompt in enumerate(PROMPTS):
        ids, mask = left_pad([prompt], PAD, torch.device("cpu"))
        draws = None
        if how.drawn:
            from finetune.evaluation.sampling import uniforms

            draws = uniforms(how.seed, [i], MOST)
        found.append(
            up_to_stop(answer(model, ids, mask, MOST, STOPS, PAD, how, draws)[0, len(prompt) :].tolist(), STOPS)
        )
    return found


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_rows_that_come_and_go_change_nothing(model: Any, how: Settings) -> None:
    wanted = alone(model, how)
    assert len({len(ids) for ids in wanted}) > 5 or how == Settings()  # they end at different times
    for size in (1, 3, 8, 24):
        assert together(model, how, size) == wanted


def test_what_has_ended_is_not_computed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows times passes, in batches of eight."""
    counted = 0

    def count(module: Any, given: Any, named: dict[str, Any]) -> None:
        nonlocal counted
        counted += len(named["input_ids"])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        told = sum(map(len, together(model, HOW["drawn"], 8)))
        with_room, counted = counted, 0
        monkeypatch.setattr(continuous, "whole", lambda cache: False)
        together(model, HOW["drawn"], 8)
    finally:
        hook.remove()
    assert told <= with_room < 1.3 * told
    assert counted > 1.5 * with_room


def test_a_window_keeps_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that a sliding window has dropped cannot be cut and joined by their places."""
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, pad_token_id=PAD, sliding_window=8)).eval()
    monkeypatch.setattr(continuous, "joined", lambda *_: pytest.fail("rows were joined"))
    assert together(windowed, HOW["drawn"], 4) == alone(windowed, HOW["drawn"])


def test_nothing_to_answer(model: Any) -> None:
    assert together(model, Settings(), 4, []) == []


def test_replies_hang_on_the_global_generator(model: Any) -> None:
    """PPO's: the same again from the same state, others from another."""
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(sample(model, PROMPTS, Sampling(1.0, max_new_tokens=MOST), STOPS, PAD, 8).tokens)
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])
