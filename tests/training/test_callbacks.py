"""Signals and loss scaling beside a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.errors import RunError
from finetune.training.callbacks import SMALLEST_SCALE, Guard, check_scale


def control() -> Any:
    return SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)


@pytest.fixture
def guard() -> Iterator[Guard]:
    made = Guard()
    made.on_train_begin(None, None, None)
    yield made
    made.restore()


def test_one_signal_lets_the_step_end_and_saves(guard: Guard) -> None:
    assert not guard.on_step_end(None, SimpleNamespace(epoch=0.5), control()).should_training_stop
    os.kill(os.getpid(), signal.SIGTERM)
    asked = guard.on_step_end(SimpleNamespace(save_strategy="epoch"), SimpleNamespace(epoch=0.5), control())
    assert (asked.should_save, asked.should_training_stop) == (True, True)


def test_at_the_end_of_an_epoch_its_own_checkpoint_is_enough(guard: Guard) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    for strategy, saved in (("epoch", False), ("steps", True)):
        args, state = SimpleNamespace(save_strategy=strategy), SimpleNamespace(epoch=1.0)
        assert guard.on_step_end(args, state, control()).should_save is saved


def test_a_second_signal_stops_at_once(guard: Guard) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_before_are_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    guard = Guard()
    guard.on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGTERM) is not before
    guard.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_steps_left_out_at_the_smallest_scale_end_the_run() -> None:
    check_scale(SimpleNamespace(get_scale=lambda: SMALLEST_SCALE), 3)
    with pytest.raises(RunError, match="not finite in float16 at step 3"):
        check_scale(SimpleNamespace(get_scale=lambda: SMALLEST_SCALE / 2), 3)
