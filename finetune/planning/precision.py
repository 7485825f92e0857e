"""bfloat16 or float32 on this CPU: timed on a block of the model's own layers, forward and backward.

That a processor has bfloat16 instructions does not make them the faster ones: on an AMD EPYC a LoRA step of
SmolLM2 takes 1.4 times less in bfloat16, on an Intel Xeon with AVX512-BF16 1.8 times more (docs/real.md).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModel

from finetune import ranks
from finetune.adapters.load import weights_dtype
from finetune.planning.sizing import CANNOT
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware, a_step, resolve
from finetune.recipe.stages import Recipe

GAIN = 0.9
"""Of float32's time: bfloat16 rounds, so it has to be faster by more than the noise of a measurement."""
TOKENS, ROUNDS = 512, 3
FLOPS = 2e10  # of a pass: a quarter of a second at most
MOST = 500_000_000  # parameters of a block, 2 GB in float32


def timed(raw: Recipe, machine: Hardware, before: str | None = None) -> tuple[Hardware, str | None]:
    """(the machine, whose bf16 says whether it is faster for this model, and what is to be said of it).

    Nothing is timed where the recipe names its precision, off CPUs and without the instructions; nor with quantized
    weights, whose kernels are others, in several processes, which must all compute alike, and for networks that cannot
    be built from a config alone.

    Args:
        before: the precision of the run to go on with, which is kept.
    """
    if raw.model.dtype != "auto" or machine.device != "cpu":
        return machine, None
    if before is not None:
        return replace(machine, bf16=before == "bfloat16"), f"model.dtype: auto is {before}, as the run was begun"
    if not machine.bf16 or raw.model.quantization is not None or machine.processes > 1 or ranks.count() > 1:
        return machine, None
    try:
        config = skeleton(raw.model).config
        full = weights_dtype(resolve(raw, machine)) == torch.float32
        found = block_seconds(config, min(a_step(raw)[1], TOKENS), full)
    except CANNOT:
        return machine, None
    if found is None:
        return machine, None
    plain, half = found
    faster = half < GAIN * plain
    kind = "bfloat16" if faster else "float32"
    said = (
        f"model.dtype: auto is {kind}: a block of the model, forward and backward, takes {half * 1e3:.3g} ms in "
        f"bfloat16 and {plain * 1e3:.3g} in float32"
    )
    return replace(machine, bf16=faster), said


_known: dict[tuple[str, int, bool, int], tuple[float, float]] = {}
"""By config, length and threads: the same answer for every run of a process."""


def block_seconds(config: Any, length: int, full: bool) -> tuple[float, float] | None:
    """CPU-seconds of a block in (float32, bfloat16), forward and backward; None for one too large to try.

    Processor time, so that what else the machine does moves it little; the least of several turns, interleaved.

    Args:
        full: whether the weights are trained, too, and so held in float32.
    """
    key = (config.to_json_string(use_diff=False), length, full, torch.get_num_threads())
    if key not in _known:
        with torch.random.fork_rng():
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(one_block(config)).parameters())
            if size > MOST:
                return None
            length = length_of(length, size)
            network = AutoModel.from_config(one_block(config)).float().requires_grad_(full)
            halved = network if full else copy.deepcopy(network).bfloat16()
            states = torch.randn(1, length, config.get_text_config().hidden_size)
            turns = [(seconds(network, states, False), seconds(halved, states, True)) for _ in range(ROUNDS + 1)]
        plain, half = (min(found) for found in zip(*turns[1:], strict=True))  # kernels are compiled in the first
        _known[key] = plain, half
    return _known[key]


def length_of(length: int, size: int) -> int:
    """Tokens to try, with `size` parameters."""
    return max(16, min(length, int(FLOPS / (4 * size))))


def one_block(config: Any) -> Any:
    """A model of one block and hardly a vocabulary, whose layers are as wide as those of `config`."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers:  # a kind for each layer
            setattr(text, name, value[:1])
        elif name.endswith("token_id") and value is not None:
            setattr(text, name, 0)
    text.num_hidden_layers, text.vocab_size = 1, 16
    return made


def seconds(network: Any, states: torch.Tensor, half: bool, clock: Callable[[], float] = time.process_time) -> float:
    """Of the processor, or by another clock, for one pass there and back."""
    states = states.to(next(network.parameters()).dtype).requires_grad_()  # as an embedding gives them
    begun = clock()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = network(inputs_embeds=states, use_cache=False).last_hidden_state
    found.float().sum().backward()
    network.zero_grad(set_to_none=True)
    return clock() - begun
