"""When a PPO run has to stop."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.errors import RunError
from finetune.recipe.stages import PpoConfig
from finetune.rl.checkpoint import State
from finetune.rl.monitor import Degenerate, check_gradient, check_numbers, degeneration, watch

FIRST = {"eos_rate": 0.9, "repetition": 0.1, "response_length": 30.0}


def row(step: int = 2, **changes: float) -> dict[str, Any]:
    return {"step": step, "loss": 0.1, "value_loss": 0.1, "kl": 1.0, **FIRST, **changes}


@pytest.mark.parametrize(
    ("changes", "signs"),
    [
        ({}, []),
        ({"eos_rate": 0.5, "repetition": 0.5, "response_length": 4.0}, []),
        ({"eos_rate": 0.4}, ["only 40% of the replies end (at first 90%)"]),
        ({"repetition": 0.7}, ["70% of their trigrams repeat others"]),
        ({"response_length": 2.0}, ["they are 2.0 tokens long (at first 30.0)"]),
    ],
)
def test_signs(changes: dict[str, float], signs: list[str]) -> None:
    assert degeneration(row(**changes), FIRST) == signs


def test_short_replies_from_the_start_are_no_sign() -> None:
    assert degeneration(row(response_length=1.0), {**FIRST, "response_length": 1.5}) == []


def test_three_bad_rollouts_in_a_row() -> None:
    state, config = State(), PpoConfig()
    watch(row(1), state, config)
    for step, repetition in enumerate((0.9, 0.9, 0.1, 0.9, 0.9), start=2):
        watch(row(step, repetition=repetition), state, config)
    with pytest.raises(Degenerate, match="degenerated for 3 rollouts"):
        watch(row(7, repetition=0.9), state, config)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kl": float("nan")}, "kl became nan"),
        ({"loss": float("inf")}, "loss became inf"), ({"value_loss": float("nan")}, "value_loss became nan"),
    ],
)  # fmt: skip
def test_what_stops_at_once(changes: dict[str, float], what: str) -> None:
    with pytest.raises(RunError, match=what) as caught:
        check_numbers(row(**changes))
    assert not isinstance(caught.value, Degenerate)


def test_rollouts_that_teach_the_policy_nothing() -> None:
    state = State()
    for step, still in enumerate((True, True, False, True, True), start=1):
        check_gradient(step, still, state)
    with pytest.raises(RunError, match=r"exactly zero for 3 rollouts up to step 6, .*: nothing is learned; lower"):
        check_gradient(6, True, state)


def test_one_far_rollout_may_be_the_estimators_tail() -> None:
    state, config = State(first=FIRST), PpoConfig()
    for step, kl in enumerate((20.5, 1.0, 25.0), start=2):
        watch(row(step, kl=kl), state, config)
    with pytest.raises(RunError, match=r"30\.0 nats per reply at step 5, over ppo\.max_kl \(20\) for 2 rollouts"):
        watch(row(5, kl=30.0), state, config)
