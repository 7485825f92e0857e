"""How many threads compute on CPUs: timed on a block of the model's own layers, forward and backward.

torch takes as many as the processor has cores, whatever a container allows of them, and for small layers one thread may
be faster than many. Whoever sets OMP_NUM_THREADS or MKL_NUM_THREADS has chosen, and a run that goes on keeps what it
had: another number rounds otherwise.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

import torch
from transformers import AutoModel

from finetune.models import hardware
from finetune.planning import precision
from finetune.planning.precision import MOST, TOKENS, length_of, one_block
from finetune.planning.sizing import CANNOT
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware, a_step
from finetune.recipe.stages import Recipe

GAIN = 0.9
"""Of the time of torch's own number: another one has to be faster by more than the noise of a busy machine."""
ROUNDS = 4
SET_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
CHOSEN = re.compile(r"\s*\+?0*[1-9]\d*\s*(,|$)")
"""A number, or one for each level of nesting; torch passes over anything else."""


def choose(recipe: Recipe, machine: Hardware, before: int | None = None) -> str | None:
    """Sets torch's number of threads; what is to be said of it.

    Nothing is changed off CPUs, with one core, and in several processes, whose launcher shares the cores out.

    Args:
        recipe: resolved; before: of the run to go on with, which is kept where there are as many cores.
    """
    if machine.device != "cpu" or machine.processes > 1:
        return None
    own, cores = torch.get_num_threads(), hardware.cores_allowed()
    if name := next((name for name in SET_BY if CHOSEN.match(os.environ.get(name, ""))), None):
        return None if own == cores else f"threads: {own} of {cores} cores, as {name} says"
    if before is not None and before <= max(cores, own):
        torch.set_num_threads(before)
        return f"threads: {before}, as the run was begun"
    if cores == own == 1:
        return None
    try:
        found = block_seconds(recipe, candidates(own, cores))
    except CANNOT:
        found = None
    if found is None:
        return None
    best = min(found, key=lambda n: found[n])
    taken = best if found[best] < GAIN * found[own] else own
    torch.set_num_threads(taken)
    told = ", ".join(f"{n}: {found[n] * 1e3:.3g} ms" for n in sorted(found))
    return f"threads: {taken} of {cores} cores; a block of the model, forward and backward, takes with {told}"


def candidates(own: int, cores: int) -> list[int]:
    """Torch's own number, all cores allowed, a half and a quarter of them, and one."""
    return sorted({own, cores, *(max(1, cores // part) for part in (2, 4)), 1})


def block_seconds(recipe: Recipe, counts: list[int]) -> dict[int, float] | None:
    """Seconds on the clock of a block forward and backward, by number of threads: the least of several turns, taken in
    rounds, as other work on the machine comes and goes. None for a block too large to try. torch's number is the same
    afterwards."""
    config = skeleton(recipe.model).config
    half = recipe.model.dtype == "bfloat16"
    full = recipe.adapter.method == "full"
    own = torch.get_num_threads()
    with torch.random.fork_rng():
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModel.from_config(one_block(config)).parameters())
        if size > MOST:
            return None
        network: Any = AutoModel.from_config(one_block(config)).float().requires_grad_(full)
        if half and not full:
            network = network.bfloat16()
        length = length_of(min(a_step(recipe)[1], TOKENS), size)
        states = torch.randn(1, length, config.get_text_config().hidden_size)
        try:
            turns = [{n: with_threads(network, states, half, n) for n in counts} for _ in range(ROUNDS + 1)]
        finally:
            torch.set_num_threads(own)
    return {n: min(turn[n] for turn in turns[1:]) for n in counts}  # kernels are compiled in the first


def with_threads(network: Any, states: torch.Tensor, half: bool, threads: int) -> float:
    """Seconds on the clock, for one pass there and back."""
    torch.set_num_threads(threads)
    return precision.seconds(network, states, half, time.perf_counter)


def before(known: dict[str, Any]) -> int | None:
    """The number that a checkpoint was trained with, where it says so and was trained on this kind of machine."""
    then = known.get("rounding") or {}
    if then.get("device") != hardware.rounding()["device"] or not str(then.get("threads")).isdecimal():
        return None
    return int(then["threads"])
