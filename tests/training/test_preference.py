"""Preference losses against values computed in float64 with plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from finetune.training.preference import PairCollator, orpo_loss, simpo_loss, stuck, with_other_answers

CHOSEN, REJECTED, LENGTHS = [-12.5, -3.25, -40.0], [-15.0, -2.0, -38.0], ([10, 4, 33], [12, 3, 40])


def arguments() -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in (CHOSEN, REJECTED, *LENGTHS))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_simpo() -> None:
    expected = [
        -log_sigmoid(2.0 * (c / m - r / n - 0.5)) for c, r, m, n in zip(CHOSEN, REJECTED, *LENGTHS, strict=True)
    ]
    assert simpo_loss(*arguments(), beta=2.0, gamma=0.5).tolist() == pytest.approx(expected, rel=1e-12)


def test_orpo() -> None:
    def log_odds(mean: float) -> float:
        return mean - math.log(1 - math.exp(mean))

    expected = [
        -c / m - 0.1 * log_sigmoid(log_odds(c / m) - log_odds(r / n))
        for c, r, m, n in zip(CHOSEN, REJECTED, *LENGTHS, strict=True)
    ]
    assert orpo_loss(*arguments(), beta=0.1).tolist() == pytest.approx(expected, rel=1e-12)


def test_orpo_of_a_certain_answer() -> None:
    """p rounds to 1: odds without end in the formula, a finite loss and gradient here."""
    chosen, rejected = (torch.tensor([logp], requires_grad=True) for logp in (0.0, -3.0))
    loss = orpo_loss(chosen, rejected, torch.tensor([4]), torch.tensor([4]), beta=0.1)
    loss.sum().backward()
    assert 0 <= loss.item() < 1e-6
    assert torch.isfinite(chosen.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(rejected.grad).all()  # type: ignore[arg-type]


def test_better_chosen_answers_lower_both_losses() -> None:
    chosen, *rest = arguments()
    for loss in (lambda c: simpo_loss(c, *rest, beta=2.0, gamma=0.5), lambda c: orpo_loss(c, *rest, beta=0.1)):
        assert (loss(chosen + 1) < loss(chosen)).all()


def test_collator_puts_chosen_rows_first() -> None:
    rows = [
        {"chosen_ids": [5, 6, 7], "chosen_mask": [0, 1, 1], "rejected_ids": [5, 8], "rejected_mask": [0, 1]},
        {"chosen_ids": [9], "chosen_mask": [1], "rejected_ids": [9, 9], "rejected_mask": [0, 1]},
    ]
    batch = PairCollator(0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0], [5, 8, 0], [9, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_a_margin_that_stands_still_is_named() -> None:
    """Whatever the loss is: an SFT term moves it away from ln 2."""

    def rows(margins: list[float]) -> list[dict[str, float]]:
        return [{"loss": 1.8, "rewards/margins": margin, "learning_rate": 1e-4} for margin in margins]

    assert "0.693" in str(stuck(rows([0.0, 0.0004, -0.0003, 0.0001, 0.0, 0.0002])))
    assert stuck(rows([0.0, 0.01, 0.05, 0.1, 0.2])) is None
    assert stuck(rows([0.0] * 3)) is None
    assert stuck([{"loss": 0.6931, "learning_rate": 1e-4}] * 8) is None


def test_held_out_rows_of_one_prompt_have_answers_of_training_rows() -> None:
    rows = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [i]} for i in (10, 11)])
    train = Dataset.from_list([{"prompt_ids": [p], "completion_ids": [20 + p]} for p in (1, 2, 3)])
    assert {ids[0] for ids in with_other_answers(rows, train, 0)["KL_completion_ids"]} <= {22, 23}
