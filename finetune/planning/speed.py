"""FLOPs of a run, and how long a machine takes for them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from finetune.planning.memory import Estimate
from finetune.planning.network import Network
from finetune.recipe.resolve import a_step
from finetune.recipe.stages import REFERENCE_FREE, PpoRecipe, Recipe

UTILISATION = (0.3, 0.5, 0.7)
"""Of the peak, what training reaches: the slow end, what is expected, and the fast end."""


@dataclass(frozen=True)
class Work:
    steps: int | None
    """Of the whole run; None where the number of rows is not known."""
    step_flops: int
    """Of an optimizer step; of PPO of a rollout and its updates."""
    flops: int | None
    """Of the run."""
    tokens: float | None
    """Mean tokens of a row; None where it is not known, and the longest allowed is taken for every row."""


def work(
    network: Network, recipe: Recipe, pass_: Estimate, steps: int | None, rows: int | None, tokens: float | None
) -> Work:
    """Args: steps: of the run; rows: training rows, which a reference scores once; tokens: of a row."""
    train, _ = a_step(recipe)
    replies = recipe.ppo.max_new_tokens if isinstance(recipe, PpoRecipe) else 0
    share = 1.0 if tokens is None else min(1.0, (tokens + replies) / pass_.length)
    row, forward = share * pass_.flops / pass_.rows, share * pass_.forward_flops / pass_.rows
    if isinstance(recipe, PpoRecipe):
        prompts = recipe.train.effective_batch_size
        # Written token by token, then read by policy, reference, value and reward model.
        rollout = prompts * forward * 5
        step = rollout + recipe.ppo.num_ppo_epochs * prompts * 2 * row
    else:
        step = train.effective_batch_size * row
    once = rows * forward if rows and needs_reference(recipe) else 0
    return Work(steps, int(step), None if steps is None else int(steps * step + once), tokens)


def needs_reference(recipe: Recipe) -> bool:
    loss = getattr(getattr(recipe, "dpo", None), "loss_type", None)
    return recipe.stage == "kto" or (recipe.stage == "dpo" and loss not in REFERENCE_FREE)


def seconds(flops: float, tflops: float) -> tuple[float, float, float]:
    """(fast, expected, slow) at 70%, 50% and 30% of the peak."""
    slow, expected, fast = (flops / (tflops * 1e12 * share) for share in UTILISATION)
    return fast, expected, slow


def measured_tflops(dtype: torch.dtype, size: int = 1024) -> float:
    """What this machine's matrix products reach, in a tenth of a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
    a @ a
    ends = time.perf_counter() + 0.1
    while time.perf_counter() < ends:
        begun = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e12
