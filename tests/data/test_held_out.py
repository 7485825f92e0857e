"""How many evaluated rows a run was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from chat_kit import assistant, make_rows, system, user, write

from finetune.data.held_out import trained_on
from finetune.data.rows import eval_mask
from finetune.data.types import Conversation, Preference, Sample
from finetune.recipe.sections import DataConfig


def samples(count: int, name: str = "x") -> list[Sample]:
    return [Conversation(row["messages"]) for row in make_rows(count, name)]


def test_the_training_file_itself(tmp_path: Path) -> None:
    data = DataConfig(train=write(tmp_path / "x.jsonl", make_rows(40)))
    assert trained_on(data, samples(40)) == 40
    assert trained_on(data, [*samples(3), *samples(3)]) == 6
    assert trained_on(data, samples(40, "other")) == 0
    assert trained_on(data, [*samples(2), *samples(5, "other")]) == 2


def test_another_system_turn_and_spacing_do_not_make_a_question_new(tmp_path: Path) -> None:
    data = DataConfig(train=write(tmp_path / "x.jsonl", make_rows(9)))
    rows = [
        Conversation([system("Be kind."), user("x question 1"), assistant("a")]),
        Conversation([user("X question 2 "), assistant("a")]),
        Conversation([user("x question 3?"), assistant("a")]),
        Conversation([user("x question 3"), assistant("a"), user("and then"), assistant("b")]),
    ]
    assert [trained_on(data, [row]) for row in rows] == [1, 1, 1, 0]
    assert trained_on(data, [Preference([user("x question 1")], [assistant("a")], [assistant("b")])]) == 1


def test_rows_that_were_held_out_of_training_are_not_counted(tmp_path: Path) -> None:
    rows = samples(200)
    for share in (0.25, 30):
        data = DataConfig(train=write(tmp_path / "x.jsonl", make_rows(200)), eval_split=share)
        held = eval_mask(np.array([row.content_hash for row in rows], np.uint64), share)
        assert 0 < held.sum() < 200
        assert trained_on(data, rows) == 200 - held.sum()


def test_data_that_is_gone_or_elsewhere_is_unknown(tmp_path: Path) -> None:
    assert trained_on(DataConfig(train=str(tmp_path / "gone.jsonl")), samples(2)) is None
    assert trained_on(DataConfig(train="-"), samples(2)) is None
    assert trained_on(DataConfig(train="owner/name"), samples(2)) is None
    assert trained_on(DataConfig(train="builtin:world"), samples(2)) is None
