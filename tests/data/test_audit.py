"""What `ft data check` finds, says and mends."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, encoder, make_rows, system, user, write

from finetune.data import audit, fix
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig


def report(
    path: Any, *, tokens: bool = False, kind: str | None = "sft", eval_data: Any = None, **settings: Any
) -> audit.Report:
    return audit.check(
        DataConfig(train=path, **settings), encoder() if tokens else None, kind=kind, eval_data=eval_data
    )


def found(result: audit.Report) -> list[tuple[str, int, str, str]]:
    return [(p["level"], p["row"], p["kind"], p["message"]) for p in result.problems]


def test_clean_data_has_no_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(20))
    result = report(path, tokens=True)
    assert result.problems == []
    assert result.rows == 20
    assert result.trained_tokens == sum(len(f"answer {i * 7}") + 1 for i in range(20))
    assert report(path).trained_tokens is None
    assert result.errors == 0


def test_a_check_leaves_the_collector_as_it_was(tmp_path: Path) -> None:
    usual = gc.get_threshold()
    report(write(tmp_path / "x.jsonl", make_rows(5)))
    assert gc.get_threshold() == usual
    with pytest.raises(UserError):
        report(str(tmp_path / "none.jsonl"))
    assert gc.get_threshold() == usual
    with audit.seldom_collecting():
        assert gc.isenabled()
        assert gc.get_threshold()[0] > usual[0]


def test_every_problem_of_every_row_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        *make_rows(2),
        {"messages": [user(""), assistant(" ")]},
        {"messages": [system("s"), user("bad \ufffd"), assistant("Ã© â€™")]},
        make_rows(1)[0],
        {"messages": [user("end <|im_end|> here"), assistant("x"), user("and?")]},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    result = report(str(path), tokens=True)
    assert found(result) == [
        ("error", 3, "empty_turn", "turn 1: the user's turn is empty → fill it in, or remove the row"),
        ("error", 3, "empty_answer", "turn 2: the assistant's answer is empty → fill it in, or remove the row"),
        ("error", 7, "malformed_json",
         "not valid JSON: Expecting property name enclosed in double quotes at column 2 → mend or remove the line"),
        ("warning", 4, "broken_encoding", "turn 2: U+FFFD, a character that was lost in a conversion"),
        ("warning", 4, "broken_encoding", "turn 3: 'Ã©' looks like text decoded with the wrong encoding"),
        ("warning", 6, "unanswered", "ends with a turn of the user, which is not trained"),
        ("warning", 6, "control_token",
         "'<|im_end|>' in the content looks like a control token; it is trained as plain text"),
        ("warning", 5, "duplicate", "the same as row 1"),
    ]  # fmt: skip
    assert all(problem["file"] == str(path) for problem in result.problems)
    assert result.kinds == dict(Counter(problem["kind"] for problem in result.problems))
    json.dumps(result.as_json())


def test_what_truncation_cuts(tmp_path: Path) -> None:
    rows = [
        *make_rows(2),
        {"messages": [user("q"), assistant("x" * 100)]},
        {"messages": [user("y" * 90), assistant("a")]},
    ]
    result = report(write(tmp_path / "x.jsonl", rows), tokens=True, max_length=64)
    assert found(result) == [
        ("warning", 3, "overlong",
         "122 tokens, over data.max_length 64: cut at the end, 57 of 101 trained tokens lost → raise data.max_length"),
        ("warning", 4, "cut_away",
         "112 tokens, over data.max_length 64: nothing that is trained is left, the row is left out"
         " → raise data.max_length"),
    ]  # fmt: skip


def test_histograms(tmp_path: Path) -> None:
    rows = [
        {"messages": [user(q), assistant("ok")]}
        for q in ("hello", "你好", "こんにちは世界", "안녕", "привет", "café", "東京です")
    ]
    result = report(write(tmp_path / "x.jsonl", rows), tokens=True)
    assert result.languages == {"en": 2, "ja": 2, "zh": 1, "ko": 1, "ru": 1}
    assert result.characters == {"4-7": 4, "8-15": 3}
    assert sum(result.tokens.values()) == 7


def test_pairs(tmp_path: Path) -> None:
    long = "z" * 200
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": long + "good", "rejected": long + "bad"},
    ]
    result = report(write(tmp_path / "x.jsonl", rows), tokens=True, kind="preference", max_length=100)
    errors = [(row, kind, message) for level, row, kind, message in found(result) if level == "error"]
    assert errors == [
        (2, "same_answers", "chosen and rejected are the same → remove the row"),
        (
            3,
            "same_answers",
            "chosen and rejected are the same within 100 tokens → raise data.max_length, or remove the row",
        ),
    ]


def test_prompts_need_no_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "q"}, {"prompt": ""}])
    assert [row for _, row, _, _ in found(report(path, kind="prompts"))] == [2]


def test_leakage_exact_and_near(tmp_path: Path) -> None:
    question = "The order {} for seven green bicycles was sent to the old harbour office on a rainy Monday morning"
    held = [
        {"prompt": question.format("4417"), "completion": "a"},
        {"prompt": "你好，请问图书馆几点开门，几点关门？", "completion": "b"},
    ]
    train = [
        {"prompt": question.format("4417").upper() + "  ", "completion": "x"},
        {"prompt": "Tell me. " + question.format("9950") + "?", "completion": "y"},
        {"prompt": "你好，请问图书馆几点开门，几点关门？谢谢", "completion": "z"},
        {"prompt": "The order for the office was never sent, says the harbour", "completion": "w"},
    ]
    test_file = write(tmp_path / "test.jsonl", held)
    result = report(write(tmp_path / "x.jsonl", train), eval_data=test_file)
    leaks = [(p["row"], p["message"]) for p in result.problems if p["kind"] == "leakage"]
    assert [row for row, _ in leaks] == [1, 2, 3]
    assert leaks[0][1] == f"the prompt is in the held-out data ({test_file}, row 1) → take it out of one of the two"
    assert "% in the held-out data" in leaks[1][1]
    assert f"({test_file}, row 2)" in leaks[2][1]
    assert result.errors == 0
    assert result.counts["leaked"] == 3


def test_held_out_rows_have_the_columns_of_the_training_rows(tmp_path: Path) -> None:
    rows = [{"ask": "Which harbour is the oldest?", "say": "a"}]
    train, held = (write(tmp_path / f"{name}.jsonl", rows) for name in ("train", "held"))
    result = report(train, eval_data=held, columns={"prompt": "ask", "completion": "say"})
    assert result.counts["leaked"] == 1


def test_many_problems_are_counted_but_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LISTED", 3)
    rows = [{"messages": [user(f"{i} <|im_end|>"), assistant("a")]} for i in range(20)]
    result = report(write(tmp_path / "x.jsonl", rows))
    assert len(result.problems) == 3
    assert result.kinds["control_token"] == 20


def test_mending(tmp_path: Path) -> None:
    held = write(tmp_path / "test.jsonl", [make_rows(9)[8]])
    rows = [
        *make_rows(4),
        {"messages": [user("q"), assistant("")]},
        make_rows(1)[0],
        make_rows(9)[8],
        {"messages": [], "id": "x"},
    ]
    path = Path(write(tmp_path / "x.jsonl", rows))
    path.write_text(path.read_text() + "{oops\n")
    before = path.read_text()
    out = tmp_path / "clean" / "y.jsonl"
    kept, taken, rejects = fix.mend(DataConfig(train=str(path)), out, eval_data=held)
    assert (kept, taken) == (4, 5)
    assert [json.loads(line) for line in out.read_text().splitlines()] == make_rows(4)
    listed = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert rejects.name == "y.rejects.jsonl"
    assert [(r["row"], r["reasons"][0][:30]) for r in listed] == [
        (5, "turn 2: the assistant's answer"), (6, f"the same as {path}"[:30]), (7, "the prompt is in the held-out "),
        (8, "the conversation has no turns"), (9, "not valid JSON: Expecting prop"),
    ]  # fmt: skip
    assert listed[3]["data"] == {"messages": [], "id": "x"}
    assert listed[4]["data"] == "{oops"
    assert path.read_text() == before
    assert report(str(out), eval_data=held).problems == []
    with pytest.raises(UserError, match="this file exists"):
        fix.mend(DataConfig(train=str(path)), out)
    with pytest.raises(UserError, match="--fix takes one source"):
        fix.mend(DataConfig(train=[str(path), str(path)]), tmp_path / "z.jsonl")


def test_the_structural_check_starts_without_the_heavy_libraries() -> None:
    code = "import sys, finetune.commands.data, finetune.data.audit, finetune.data.fix, finetune.data.preview;"
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_half_a_character_can_be_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(make_rows(1)[0]) + '\n{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    fix.mend(DataConfig(train=str(path)), tmp_path / "y.jsonl")
    assert "\\ud83d" in (tmp_path / "y.rejects.jsonl").read_text()


def test_the_same_question_under_another_system_turn_is_told(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [{"messages": [system("A"), user("Why is it so?"), assistant("a")]}])
    rows = [
        {"messages": [system("B, and at length."), user("why is it so"), assistant("b")]},
        {"messages": [system("A"), user("Why is it so?"), assistant("c")]},
        {"messages": [user("Why is it not?"), assistant("d")]},
    ]
    made = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", rows)), None, "sft", held)
    assert len(list(made.rows())) == 3
    assert [(row, found.kind) for _, _, row, found in made.notes.problems] == [(1, "same_question"), (2, "leakage")]
    assert "1 rows whose question is in the held-out data, under another system turn" in made.warnings()
    assert made.counts["leaked"] == 1
    assert list(fix.rejects(made)) == [(held.replace("held", "x"), 2)]  # --fix takes out what is surely the same


def test_the_assistants_own_tags_are_no_forged_tokens(tmp_path: Path) -> None:
    from test_templates import make

    rows = [
        {"messages": [user("q"), assistant("<think>\nt\n</think>\n\na")]},
        {"messages": [user("<think> q"), assistant("a")]},
    ]
    found = audit.check(DataConfig(train=write(tmp_path / "x.jsonl", rows)), make("qwen3")[1]).problems
    assert [(p["row"], p["kind"]) for p in found] == [(2, "control_token")]
