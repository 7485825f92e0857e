"""What a PPO run keeps between rollouts: its counters, and checkpoints, complete or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.metrics import mean
from finetune.models.hardware import rounding
from finetune.run.checkpoints import complete, discard, rotate
from finetune.run.directory import Run
from finetune.run.writing import write_json
from finetune.training.weight_check import check_finite


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan, Golub and LeVeque 1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Sequence[float]) -> None:
        n, average = len(values), mean(values)
        delta, total = average - self.mean, self.count + n
        self.squares += sum((v - average) ** 2 for v in values) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 1.0


@dataclass
class State:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    kl_coef: float = 0.0
    moments: RunningMoments = field(default_factory=RunningMoments)
    first: dict[str, float] = field(default_factory=dict)
    """eos_rate, repetition and length of the first rollout: what is normal for this model."""
    bad: int = 0
    far: int = 0
    zero: int = 0
    losses: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    """Scores of the held-out prompts before training."""
    seconds: float = 0.0


def save_checkpoint(
    run: Run, state: State, weights: Mapping[str, torch.Tensor], stateful: Mapping[str, Any], keep: int,
    inputs: Mapping[str, str],
) -> None:  # fmt: skip
    """checkpoints/checkpoint-STEP, complete or not there; older ones over `keep` go.

    Args:
        weights: what is trained, by name; stateful: optimizer, scheduler, … by name.
        inputs: what the run reads, by content.
    """
    check_finite(weights.items(), f"at step {state.step}")
    folder = run.checkpoints / f"checkpoint-{state.step}"
    apart = discard(folder) if folder.exists() else set()  # what a kill or a damaged checkpoint has left
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(copies, folder / "trainable.safetensors")
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    torch.save({**{k: v.state_dict() for k, v in stateful.items()}, "random": random}, folder / "optimizer.pt")
    write_json(folder / "state.json", asdict(state))
    complete(folder, apart, inputs=dict(inputs), rounding=rounding())
    rotate(run.checkpoints, keep)


@torch.no_grad()
def load_checkpoint(folder: Path, weights: Mapping[str, torch.Tensor], stateful: Mapping[str, Any]) -> State:
    """Puts everything back in place, the random generators, too."""
    stored = load_file(folder / "trainable.safetensors")
    for name, tensor in weights.items():
        tensor.copy_(stored[name])
    kept = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    for name, thing in stateful.items():
        thing.load_state_dict(kept[name])
    torch.set_rng_state(kept["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in kept["random"]:
        torch.cuda.set_rng_state_all(kept["random"]["cuda"])
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return State(**{**state, "moments": RunningMoments(**state["moments"])})
