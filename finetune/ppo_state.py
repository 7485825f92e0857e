"""What a PPO run knows between rollouts: its counters, its checkpoints, and when it has to stop.

State                               what a checkpoint keeps besides tensors
save_checkpoint, load_checkpoint    between rollouts, complete or not there
watch(row, state, config)           RunError when the policy has left the reference or its replies degenerate
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.proof import check_finite
from finetune.errors import RunError
from finetune.metrics import mean
from finetune.progress import warn
from finetune.recipe import PpoConfig
from finetune.run import Run, complete, rotate, write_json

DEGENERATE = 3  # rollouts in a row that must look bad before a run is stopped
FAR = 2  # rollouts in a row over max_kl: the estimator's tail is heavy, one unlikely token can be 20 nats


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
    losses: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    """Scores of the held-out prompts before training."""
    seconds: float = 0.0


class Degenerate(RunError):
    """Replies that are worth no more training; the policy as it is may still be looked at."""


def watch(row: Mapping[str, Any], state: State, config: PpoConfig) -> None:
    """RunError when the policy has left the reference, Degenerate when its replies are no replies any more.

    Args:
        row: what a step says for metrics.jsonl; state: knows what the first rollout looked like, and counts bad ones.
    """
    for key in ("loss", "value_loss", "kl"):
        if not math.isfinite(row[key]):
            raise RunError(f"{key} became {row[key]} at step {row['step']}: lower train.learning_rate")
    state.far = state.far + 1 if row["kl"] > config.max_kl else 0
    if state.far:
        what = f"KL to the reference is {row['kl']:.1f} nats per reply at step {row['step']}, over ppo.max_kl"
        what += f" ({config.max_kl:g})"
        if state.far >= FAR:
            how = "lower train.learning_rate or ppo.num_ppo_epochs, or raise ppo.kl_coef"
            raise RunError(f"{what} for {FAR} rollouts: {how}")
        warn(what)
    if not state.first:
        state.first = {key: row[key] for key in ("eos_rate", "repetition", "response_length")}
        if row["eos_rate"] < 0.05:
            warn("hardly a reply ends by itself within ppo.max_new_tokens: raise it, or look at the SFT data")
        return
    signs = degeneration(row, state.first)
    state.bad = state.bad + 1 if signs else 0
    if state.bad >= DEGENERATE:
        raise Degenerate(
            f"replies have degenerated for {DEGENERATE} rollouts: {'; '.join(signs)}. The reward pays for this: "
            "raise ppo.kl_coef, lower train.learning_rate, or mend the reward"
        )
    if signs:
        warn(f"step {row['step']}: {'; '.join(signs)}")


def degeneration(row: Mapping[str, Any], first: Mapping[str, float]) -> list[str]:
    """In what this rollout's replies are worse than those of the first."""
    signs = []
    if first["eos_rate"] > 0.2 and row["eos_rate"] < 0.5 * first["eos_rate"]:
        signs.append(f"only {row['eos_rate']:.0%} of the replies end (at first {first['eos_rate']:.0%})")
    if row["repetition"] > first["repetition"] + 0.5:
        signs.append(f"{row['repetition']:.0%} of their trigrams repeat others")
    # A reply is never shorter than its end token.
    if first["response_length"] > 2 and row["response_length"] <= max(1.1, 0.1 * first["response_length"]):
        signs.append(f"they are {row['response_length']:.1f} tokens long (at first {first['response_length']:.1f})")
    return signs


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
    if folder.exists():
        shutil.rmtree(folder)  # what a kill or a damaged checkpoint has left
    folder.mkdir(parents=True)
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(copies, folder / "trainable.safetensors")
    random: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    torch.save({**{k: v.state_dict() for k, v in stateful.items()}, "random": random}, folder / "optimizer.pt")
    write_json(folder / "state.json", asdict(state))
    complete(folder, inputs=dict(inputs))
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
