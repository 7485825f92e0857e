"""`eval.shots`: examples before held-out rows, as earlier turns, drawn by seed and by the row's own text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ft, make_tokenizer, train, write_rows

from finetune.data.chat import make_encoder
from finetune.data.held_out import rows_of
from finetune.data.rows import eval_mask
from finetune.data.samples import read_samples
from finetune.evaluation import during, shots
from finetune.recipe.file import load
from finetune.recipe.sections import DataConfig

Recipe = Callable[..., Path]
SETTINGS = {"max_new_tokens": 4, "batch_size": 8}


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """The first stands in the training data, spelled otherwise; the second has a system turn."""
    turns = [[("user", "SAY 1 "), ("assistant", "1 7")], [("system", "be short"), ("user", "x"), ("assistant", "y")]]
    turns += [[("user", f"ask {i}"), ("assistant", f"{i}")] for i in range(4)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    return write_rows(tmp_path / "held.jsonl", rows)


def asked(tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """(the JSON, the turns of each row as the model was asked)."""
    rows = tmp_path / "predictions.jsonl"
    said = ft("eval", *arguments, "--json", "-", "--predictions", rows, "--show", "0")
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout), [json.loads(line)["messages"] for line in rows.read_text().splitlines()]


def texts(turns: list[dict[str, Any]]) -> list[str]:
    return [turn["content"] for turn in turns]


def test_shots_before_answers(recipe: Recipe, held: Path, tmp_path: Path) -> None:
    run = train(recipe(train={"max_steps": 1}, eval={**SETTINGS, "shots": 2}))
    found, rows = asked(tmp_path, run.path, "--data", held)
    assert (found["shots"], found["shots_from"], found["shots_seed"]) == (2, "data.train", 0)
    assert [[turn["role"] for turn in row] for row in (rows[0], rows[1])] == [
        ["user", "assistant"] * 2 + ["user"], ["system"] + ["user", "assistant"] * 2 + ["user"],
    ]  # fmt: skip
    known = {(f"say {i}", f"{i} {i * 7 % 10}") for i in range(64)}
    for row in rows:
        parts = texts(row)[-5:]
        pairs = {(parts[0], parts[1]), (parts[2], parts[3])}
        assert len(pairs) == 2
        assert pairs <= known - {("say 1", "1 7")} or row is not rows[0]
        assert pairs <= known
    assert len({tuple(texts(row)[-5:-1]) for row in rows}) > 3, "drawn for each row"
    alone = asked(tmp_path, run.path, "--data", held, "--limit", "2")[1]
    assert alone == rows[:2], "whatever stands beside it"
    other, drawn = asked(tmp_path, run.path, "--data", held, "--seed", "3")
    assert other["shots_seed"] == 3
    assert drawn != rows
    plain = asked(tmp_path, run.path, "--data", held, "--shots", "0")
    assert "shots" not in plain[0]
    assert len(plain[1][0]) == 1
    losses = [one["runs"][0]["metrics"]["loss"] for one in (found, plain[0])]
    assert losses[0] != losses[1], "references are scored behind them, too"


def test_a_row_is_never_its_own_shot(base: Path, held: Path, tmp_path: Path) -> None:
    """Without training rows the others of the file are shown; all five others here."""
    found, rows = asked(tmp_path, "--model", base, "--data", held, "--shots", "5")
    assert found["shots_from"] == "the other rows"
    for row in rows:
        assert texts(row)[-1] not in texts(row)[:-1]
    limited = asked(tmp_path, "--model", base, "--data", held, "--shots", "5", "--limit", "1")[1]
    assert limited == rows[:1], "the others are those of the whole file"
    chosen = [{"prompt": f"say {i}", "chosen": f"{i} yes", "rejected": "no"} for i in range(5)]
    pairs = write_rows(tmp_path / "with, pairs.jsonl", chosen)
    found, rows = asked(tmp_path, "--model", base, "--data", held, "--shots", "4", "--shots-from", pairs)
    assert found["shots_from"] == str(pairs)
    assert len(rows[0]) == 9
    assert not {"say 1", "no"} & set(texts(rows[0]))


def test_of_a_dataset_folder_its_training_rows_are_shown(held: Path, tmp_path: Path) -> None:
    """Which is also what a run's checkpoint knows of eval.shots_from; its validation rows are for measuring."""
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "validation"):
        rows = [{"prompt": f"{split} {i}", "completion": f"{i}"} for i in range(3)]
        write_rows(folder / f"{split}.jsonl", rows)
    found = shots.find(1, rows_of(str(held), DataConfig(train="-"), None), str(folder))
    assert sorted(one.questions for one in found.pool) == ["train0", "train1", "train2"]


def test_shots_that_do_not_fit_are_left_out(base: Path, held: Path, tmp_path: Path) -> None:
    """The base was made for 512 tokens, and its tokens are bytes."""
    long = [{"prompt": f"say {i}", "completion": f"{i}" * 150} for i in range(6)]
    source = write_rows(tmp_path / "long.jsonl", long)
    said = ft("eval", "--model", base, "--data", held, "--shots", "3", "--shots-from", source)
    assert said.returncode == 0, said.stderr
    assert "rows are asked with fewer shots: prompt and answer would have over 512 tokens" in said.stderr
    assert "shots 3" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shots-from", "{held}"], "--shots-from: has no effect: no shots are given"),
        (["--shots", "2", "--shots-from", "{tmp}/nothing.jsonl"], "--shots-from"),
        (["--shots", "6"], "--shots: 6 shots are wanted, and of the other rows 5 others have answers"),
        (["--shots", "1", "--data", "{pairs}"], "--shots: has no effect: shots are before answers or multiple choice"),
        (["--shots", "1", "--shots-from", "{bare}"], "--shots-from: no row there has a question and an answer"),
    ],
)
def test_shots_that_cannot_be(base: Path, held: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "say", "chosen": "yes", "rejected": "no"}])
    bare = write_rows(tmp_path / "bare.jsonl", [{"prompt": "say"}])
    named = {"held": held, "tmp": tmp_path, "pairs": pairs, "bare": bare}
    arguments = [part.format(**named) for part in arguments]
    found = ft("eval", "--model", base, *([] if "--data" in arguments else ["--data", held]), *arguments)
    assert found.returncode == 2
    assert said in found.stderr


def test_no_row_that_training_holds_out_is_shown(recipe: Recipe, rows: Path, held: Path) -> None:
    """Whatever is evaluated: rows of another file, or some of them while the run trains."""
    found = load(str(recipe(data={"train": str(rows), "eval_split": 24})), None)
    every = [item.usable for item in read_samples(str(rows), found.data)]
    mask = eval_mask(np.asarray([one.content_hash for one in every], np.uint64), 24)
    apart = {one.questions for one, kept in zip(every, mask, strict=True) if kept}
    assert len(apart) == 24
    others = rows_of(str(held), found.data, None)
    pool = shots.find(40, others, None, found).pool
    assert {one.questions for one in pool} == {one.questions for one in every} - apart
    trained = load(str(recipe(data={"train": str(rows), "eval_split": 24}, eval={"during": {"limit": 2}})), None)
    few = during.held_out(trained, make_encoder(make_tokenizer()), 2)
    assert len(few.rows) == 2
    assert {one.questions for one in shots.find(40, few, None, trained).pool} == {one.questions for one in pool}


def test_recipes_name_what_does_something(recipe: Recipe, held: Path) -> None:
    found = ft("sft", recipe(eval={"shots_from": str(held)}), "--dry-run")
    assert found.returncode == 2
    assert "eval.shots_from: no shots are given" in found.stderr


def test_shots_while_training(recipe: Recipe, held: Path, tmp_path: Path) -> None:
    """They are the same as afterwards."""
    sections = {"data": str(held), **SETTINGS, "shots": 2, "during": {"steps": 1, "metrics": "rougeL"}}
    run = train(recipe(train={"max_steps": 1, "learning_rate": 0.05}, eval=sections))
    now = json.loads(run.result.read_text())["eval"]["rougeL"]
    assert now == pytest.approx(asked(tmp_path, run.path, "--metrics", "rougeL")[0]["runs"][0]["metrics"]["rougeL"])
