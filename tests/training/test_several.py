"""What one of several processes does alone: no others are started here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from finetune import ranks
from finetune.commands.kto import check_others
from finetune.run.checkpoints import complete
from finetune.training import session
from finetune.training.checkpointing import Checkpointing
from finetune.training.plan import Layout


class Counting(Checkpointing):
    """A trainer between two of its rows of figures."""

    def __init__(self, folder: Path, figures: dict[str, list[float]]) -> None:
        self.args: Any = SimpleNamespace(
            output_dir=str(folder), device="cpu", logging_steps=3, eval_steps=3, save_steps=2
        )
        self.state = TrainerState(max_steps=6)
        self.health: Any = SimpleNamespace(first=1.0, high=0, zero=0)
        self.callback_handler = SimpleNamespace(callbacks=[])
        self._metrics = {"train": dict(figures), "eval": {}}
        self._total_loss_scalar, self._globalstep_last_logged, self._total_train_tokens = 0.0, 0, 8
        self._tr_loss = torch.tensor(1.0)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))


def test_figures_that_wait_for_their_row_are_those_of_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A checkpoint between two rows of figures: the next row has each of them once, whoever goes on."""
    as_rank(monkeypatch, 0)
    monkeypatch.setattr(ranks, "each", lambda own: [own, {"accuracy": [0.0, 1.0], "only": [3.0]}])
    monkeypatch.setattr(ranks, "totals", lambda values: [2 * value for value in values])
    monkeypatch.setattr(ranks, "total", lambda value: 2 * value)
    counters = Counting(tmp_path, {"accuracy": [0.5]})._counters()
    complete(folder(tmp_path), inputs={}, counters=counters, rounding={})
    found = []
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        one = Counting(tmp_path, {})
        one.count_on(folder(tmp_path))
        found.append(one._metrics["train"])
    assert found == [{"accuracy": [0.5, 0.0, 1.0], "only": [3.0]}, {}]


def folder(path: Path) -> Path:
    made = path / "checkpoint-2"
    made.mkdir(exist_ok=True)
    return made


def test_a_row_of_each_process_is_a_step_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """KTO's KL term is a mean over the rows of all."""
    rows = {"prompt_ids": [[1], [2]]}
    as_rank(monkeypatch, 0)
    check_others(Layout(1, 1, 1, 1), rows)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ranks.UserError, match="one is alone in it"):
        check_others(Layout(1, 1, 1, 1), rows)


def test_a_dry_run_says_how_many_share_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"rows": 48, "trained_tokens": 0, "dropped": 0}
    stub: Any = SimpleNamespace(
        inputs=lambda dry_run: None, recipe=SimpleNamespace(model=SimpleNamespace(quantization=None)),
        rows=SimpleNamespace(counts=counts), layout=Layout(2, 2, 6, 6), packed=Layout(2, 1, 3, 3),
    )  # fmt: skip
    monkeypatch.setattr(session, "to_yaml", lambda recipe: "")
    as_rank(monkeypatch, 0)
    session.Session.show(stub)
    said = capsys.readouterr().err
    assert "packed: 3 steps of 2 rows x 1 pass x 2 processes\n" in said
    assert "6 steps of 2 rows x 2 passes x 2 processes; nothing was written" in said
