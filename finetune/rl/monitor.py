"""When a PPO run has to stop: KL that explodes, replies that degenerate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from finetune.errors import RunError
from finetune.recipe.stages import PpoConfig
from finetune.rl.checkpoint import State
from finetune.terminal.progress import warn
from finetune.training.health import ZERO_STEPS

DEGENERATE = 3  # rollouts in a row that must look bad before a run is stopped
FAR = 2  # rollouts in a row over max_kl: the estimator's tail is heavy, one unlikely token can be 20 nats


class Degenerate(RunError):
    """Replies that are worth no more training; the policy as it is may still be looked at."""


def check_numbers(row: Mapping[str, Any]) -> None:
    """RunError for what is no number in what a step says for metrics.jsonl."""
    for key in ("loss", "value_loss", "kl"):
        if not math.isfinite(row[key]):
            raise RunError(f"{key} became {row[key]} at step {row['step']}: lower train.learning_rate")


def check_gradient(step: int, still: bool, state: State) -> None:
    """RunError for a policy that gets no gradient, whatever its replies are worth.

    Args:
        still: whether it got none in this rollout; state: counts such rollouts.
    """
    state.zero = state.zero + 1 if still else 0
    if state.zero >= ZERO_STEPS:
        what = f"the policy's gradient has been exactly zero for {ZERO_STEPS} rollouts up to step {step}"
        how = "lower train.learning_rate, raise ppo.temperature, or set model.dtype: float32 and no model.quantization"
        raise RunError(f"{what}, and its replies are not all worth the same: nothing is learned; {how}")


def watch(row: Mapping[str, Any], state: State, config: PpoConfig) -> None:
    """RunError when the policy has left the reference, Degenerate when its replies are no replies any more.

    Args:
        row: what a step says for metrics.jsonl; state: knows what the first rollout looked like, and counts bad ones.
    """
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
