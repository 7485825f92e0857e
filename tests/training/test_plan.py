"""How many steps a run has, in numbers worked out by hand: every row is trained on, in every epoch."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.errors import UserError
from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware
from finetune.training.plan import FEW_UPDATES, Layout, few_rows, few_updates, layout

# 4096 tokens go into a pass without a GPU: two rows of 2048.
TWO_A_PASS = {"max_length": 2048}


def recipe(data: dict[str, Any] | None = None, **train: Any) -> Any:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "m"}, "output": {"dir": "r"},
        "data": {"train": "d", **TWO_A_PASS, **(data or {})}, "train": {"effective_batch_size": 8, **train},
    }  # fmt: skip
    return check(values, "sft")


@pytest.mark.parametrize(
    ("rows", "train", "expected"),
    [
        # 17 rows are 9 passes of 2, and those are 3 steps of 4 passes; the last is smaller.
        (17, {"num_train_epochs": 1}, Layout(2, 4, 3, 3)),
        (16, {"num_train_epochs": 1}, Layout(2, 4, 2, 2)),
        (15, {"num_train_epochs": 1}, Layout(2, 4, 2, 2)),
        (18, {"num_train_epochs": 1}, Layout(2, 4, 3, 3)),
        # One and a half of 3 steps are 4.5: the half epoch is trained, too.
        (17, {"num_train_epochs": 1.5}, Layout(2, 4, 3, 5)),
        (17, {"num_train_epochs": 2}, Layout(2, 4, 3, 6)),
        (1, {"num_train_epochs": 3}, Layout(2, 4, 1, 3)),
        (17, {"max_steps": 100}, Layout(2, 4, 3, 100)),
        (17, {"num_train_epochs": 1, "per_device_train_batch_size": 8}, Layout(8, 1, 3, 3)),
        (17, {"num_train_epochs": 1, "gradient_accumulation_steps": 8}, Layout(1, 8, 3, 3)),
    ],
)
def test_steps(rows: int, train: dict[str, Any], expected: Layout) -> None:
    assert layout(recipe(**train), rows, rows, Hardware()) == expected


def test_every_process_takes_its_share() -> None:
    """Two processes of 4 rows each, in passes of 2: 17 rows are 5 passes of both, and 3 steps."""
    assert layout(recipe(num_train_epochs=1), 17, 17, Hardware(processes=2)) == Layout(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("samples", "rows", "expected"),
    [
        (40, 10, Layout(2, 1, 5, 5)),  # 4 samples a row: 2 rows are the 8 samples of a step
        (41, 10, Layout(2, 1, 5, 5)),
        (44, 11, Layout(2, 1, 6, 6)),
        (40, 16, Layout(1, 3, 6, 6)),  # 2.5 samples a row: 3 rows
        (200, 10, Layout(1, 1, 10, 10)),  # 20 a row, more than a step should hold
    ],
)
def test_packed_rows_hold_several_samples(samples: int, rows: int, expected: Layout) -> None:
    assert layout(recipe({"packing": True}, num_train_epochs=1), samples, rows, Hardware()) == expected


def test_packed_rows_of_a_step_are_shared_out_evenly_or_refused() -> None:
    """A step of one packed row would be two in two processes: another batch than effective_batch_size says."""
    packed = recipe({"packing": True}, num_train_epochs=1, effective_batch_size=6)
    assert layout(packed, 40, 20, Hardware()).accumulation * layout(packed, 40, 20, Hardware()).rows_per_pass == 3
    with pytest.raises(UserError, match="3 packed rows cannot be shared out evenly over 2 processes → set it to 8"):
        layout(packed, 40, 20, Hardware(processes=2))


def test_an_evaluation_that_would_never_come() -> None:
    """17 rows twice are 6 steps."""
    held_out = {"eval_split": 4}
    assert layout(recipe(held_out, num_train_epochs=2, eval_steps=6), 17, 17, Hardware()).total_steps == 6
    with pytest.raises(UserError, match=r"7 steps between evaluations, and the run has 6: there would be none"):
        layout(recipe(held_out, num_train_epochs=2, eval_steps=7), 17, 17, Hardware())


def test_what_is_few() -> None:
    assert few_updates(FEW_UPDATES) is None
    assert few_updates(FEW_UPDATES - 1) == "only 49 updates; 50 or more want more data or epochs, or a smaller batch"
    assert few_rows(recipe(), 8) is None
    assert few_rows(recipe(), 7) == "7 training rows are fewer than train.effective_batch_size 8: a step holds 7"


def test_adalora_needs_a_step_to_share_out_ranks() -> None:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "m"}, "output": {"dir": "r"},
        "data": {"train": "d"}, "adapter": {"method": "adalora"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"train.max_steps.*2 steps or more"):
        layout(check({**values, "train": {"max_steps": 1, "warmup_steps": 0}}, "sft"), 4, 4, Hardware())
    layout(check({**values, "train": {"max_steps": 2, "warmup_steps": 0}}, "sft"), 4, 4, Hardware())
