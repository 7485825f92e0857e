"""How many evaluated rows a run was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from chat_kit import assistant, make_rows, system, user, write

from finetune.data.held_out import Leak, leaks
from finetune.data.rows import eval_mask
from finetune.data.types import Conversation, Preference, Sample
from finetune.recipe.sections import DataConfig


def samples(count: int, name: str = "x") -> list[Sample]:
    return [Conversation(row["messages"]) for row in make_rows(count, name)]


def trained_on(data: DataConfig, rows: list[Sample]) -> int | None:
    found = leaks(data, rows, 42)
    return None if found is None else sum(leak is not None for leak in found)


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


LONG = "In the town of {} there lived a baker who rose each day at four and sold {} loaves before the church bell rang."


def test_how_a_row_is_known_and_from_where(tmp_path: Path) -> None:
    texts = [LONG.format("Rye", "forty"), LONG.format("Ely", "sixty"), LONG.format("Rye", "forty") + " Why?"]
    trained = [{"messages": [user(texts[0]), assistant("a")]}, *make_rows(3)]
    data = DataConfig(train=(file := write(tmp_path / "x.jsonl", trained)))
    rows: list[Sample] = [
        Conversation([user(texts[0].upper()), assistant("b")]),
        Conversation([user(texts[2]), assistant("b")]),
        Conversation([system("Be kind."), user("x question 1"), assistant("b")]),
        Conversation([user("What else did the fisherman of Hull say about the weather on the third day?")]),
    ]
    found = leaks(data, rows, 42)
    assert found is not None
    same, near, asked, none = found
    assert same == Leak(1.0, str(file), 1)
    assert near is not None
    assert (near.row, 0.8 <= near.similarity < 1) == (1, True), "the same training row may be like several"
    assert (asked, none) == (Leak(0.0, str(file), 3), None)
