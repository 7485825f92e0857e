"""What a run leaves behind, and what of it counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.run.checkpoints import complete
from finetune.run.directory import Run
from finetune.run.guards import check_output


def test_incomplete_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (5, 10, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert run.last_checkpoint() is None
    for step in (5, 10):
        complete(run.checkpoints / f"checkpoint-{step}")
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-10"
    with pytest.raises(UserError, match="no complete checkpoint"):
        check_output(tmp_path / "other", overwrite=False, resume=True)


def test_metrics_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics({"step": step})
    run.forget_after(2)
    assert [row["step"] for row in run.read_metrics()] == [1, 2]
