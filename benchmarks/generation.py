"""Answers one by one, in batches, in ft's continuous batches and transformers': tokens a processor second.

    python benchmarks/generation.py [--rounds 3]

A random Llama of 15M parameters in float32, one thread, 32 prompts of 10 to 60 tokens. `even`: every answer has 48
tokens. `uneven`: at random an answer ends after 26 tokens in the mean, after 128 at most.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from finetune.evaluation.generation import written
from finetune.recipe.sections import GenerationConfig as Settings

Prompts = list[list[int]]
VOCABULARY = 6144


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def settings(even: bool) -> GenerationConfig:
    ends = [VOCABULARY] if even else list(range(0, VOCABULARY, 32))  # a token that there is not
    return GenerationConfig(do_sample=True, eos_token_id=ends, pad_token_id=1, max_new_tokens=48 if even else 128)


def batches(network: PreTrainedModel, prompts: Prompts, given: GenerationConfig, size: int) -> int:
    """Tokens written, `size` prompts of similar length at a time."""
    written, ends = 0, torch.tensor(given.eos_token_id)
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[1] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        found = network.generate(ids, attention_mask=mask, generation_config=given)[:, longest:]  # type: ignore[operator]
        after_end = torch.isin(found, ends).cumsum(1) - torch.isin(found, ends).long()
        written += int((after_end == 0).sum())
    return written


def continuous(network: PreTrainedModel, prompts: Prompts, given: GenerationConfig) -> int:
    # Room for all prompts with their answers: by itself it would take 80% of main memory.
    room = ContinuousBatchingConfig(page_size=32, num_blocks=256, max_batch_tokens=512)
    found = network.generate_batch(inputs=prompts, generation_config=given, continuous_batching_config=room)  # type: ignore[operator]
    return sum(len(answer.generated_tokens) for answer in found.values())


def ours(network: PreTrainedModel, prompts: Prompts, given: GenerationConfig) -> int:
    how = Settings(temperature=1.0)
    ended = written(network, prompts, given.max_new_tokens, 16, given.eos_token_id, 1, how, apart=False)
    return sum(len(ids) for some in ended for _, ids in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    network, draw = model(), random.Random(0)
    prompts = [[draw.randrange(2, VOCABULARY) for _ in range(draw.randint(10, 60))] for _ in range(32)]
    ways: dict[str, Callable[[GenerationConfig], int]] = {
        **{f"{n} at a time": lambda g, n=n: batches(network, prompts, g, n) for n in (1, 4, 16)},
        "ft, 16 at most": lambda g: ours(network, prompts, g),
        "transformers' generate_batch": lambda g: continuous(network, prompts, g),
    }
    for even in (True, False):
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                begun = time.process_time()
                written = way(settings(even))
                rates[name].append(written / (time.process_time() - begun))
        for name, found in rates.items():
            print(f"{'even' if even else 'uneven'}, {name}: {statistics.median(found):.0f} tokens/CPU-s", flush=True)


if __name__ == "__main__":
    main()
