"""Samples as the model sees them, and the commands that show them."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, encoder, make_rows, tokenizer, user, write

from finetune.data import preview
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig


def shown(path: str, **settings: Any) -> list[dict[str, Any]]:
    return preview.samples(DataConfig(train=path, **settings), encoder(), 3)


def test_samples(tmp_path: Path) -> None:
    samples = shown(write(tmp_path / "x.jsonl", [*make_rows(1), {"messages": []}, *make_rows(9)]))
    assert [sample["row"] for sample in samples] == [1, 3, 4]
    first = samples[0]
    assert set(first) == {"file", "row", "input_ids", "labels", "tokens", "text", "roles"}
    assert len(first["input_ids"]) == len(first["labels"]) == len(first["tokens"])
    assert first["text"] == "".join(first["tokens"])
    assert (
        "".join(t for t, label in zip(first["tokens"], first["labels"], strict=True) if label != -100)
        == "answer 0<|im_end|>"
    )


def test_characters_of_several_tokens_stay_whole() -> None:
    ids = tokenizer().encode("é你🙂x", add_special_tokens=False)
    assert preview.tokens(tokenizer(), ids) == ["", "é", "", "", "你", "", "", "", "🙂", "x"]
    assert "".join(preview.tokens(tokenizer(), ids[:-2])) == tokenizer().decode(ids[:-2])


def test_pairs_give_two_samples() -> None:
    samples = preview.samples(DataConfig(train="builtin:preference"), encoder(), 1, "preference")
    assert [(s["answer"], s["row"]) for s in samples] == [("chosen", 1), ("rejected", 1)]


def test_as_text(tmp_path: Path) -> None:
    samples = shown(write(tmp_path / "x.jsonl", make_rows(2)))
    text = preview.as_text(samples, preview.packs(samples, 200))
    assert "══ packed row 1: 2 samples" in text.plain
    assert f"{tmp_path}/x.jsonl, row 1 · 41 tokens, 9 trained" in text.plain
    green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == "bold green")
    assert green == "answer 0<|im_end|>answer 7<|im_end|>"


def test_a_page_that_content_cannot_break_out_of(tmp_path: Path) -> None:
    rows = [{"messages": [user("<script>alert(1)</script>"), assistant("</pre><b>{x}")]}]
    page = preview.as_html(shown(write(tmp_path / "x.jsonl", rows)))
    assert "<script>" not in page
    assert "<mark>&lt;/pre&gt;&lt;b&gt;{x}&lt;|im_end|&gt;</mark>" in page


def test_roles_are_told_apart_on_the_page(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be <kind>"},
                user("hi"),
                assistant("a"),
                user("more?"),
                assistant("hi"),
            ]
        }
    ]
    page = preview.as_html(shown(write(tmp_path / "x.jsonl", rows), train_on="last"))
    body = page[page.index("<pre>") :]
    said = re.findall(r'<span data-role="(\w+)">(.*?)</span>', body)
    assert said == [("system", "be &lt;kind&gt;"), ("user", "hi"), ("assistant", "a"), ("user", "more?")]
    assert "<mark>hi&lt;|im_end|&gt;</mark>" in body
    text = html.unescape(re.sub(r"<[^>]*>", "", body.partition("</pre>")[0]))
    assert text == shown(write(tmp_path / "y.jsonl", rows))[0]["text"]
    everything = preview.as_html(shown(write(tmp_path / "z.jsonl", rows), train_on="all"))
    assert '<span data-role="user">more?</span>' in everything.partition("<mark>")[2]


def test_a_page_reads_in_one_direction(tmp_path: Path) -> None:
    """An override of the direction, even in a row, would set the marks beside what is trained."""
    rows = [{"messages": [user("hi\u202e there"), assistant("so\u2066 it is")]}]
    page = preview.as_html(shown(write(tmp_path / "x.jsonl", rows)))
    assert "hi\\u202e there" in page
    assert "<mark>so\\u2066 it is" in page
    assert "\u202e" not in page


def test_without_colours_trained_text_stands_between_marks(tmp_path: Path) -> None:
    text = preview.as_text(shown(write(tmp_path / "x.jsonl", make_rows(1))), coloured=False).plain
    assert "⟦answer 0<|im_end|>⟧" in text
    assert text.count("⟦") == 1


def test_nothing_to_show_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the conversation has no turns"):
        shown(write(tmp_path / "x.jsonl", [{"messages": []}]))


def run(*arguments: str) -> int:
    """The command in this process; its exit code."""
    from finetune.cli import app

    return int(app(args=["data", *arguments], standalone_mode=False) or 0)


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path) -> None:
    good, bad = (
        write(tmp_path / "good.jsonl", make_rows(3)),
        write(tmp_path / "bad.jsonl", [*make_rows(3), {"messages": []}]),
    )
    assert run("check", "--data", good) == 0
    said = capsys.readouterr()
    assert "3 rows, 3 usable" in said.out.splitlines()
    assert said.err.splitlines() == ["reading 3 rows of good.jsonl"]
    assert run("check", "--data", bad) == 2
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"error: {bad}, row 4: the conversation has no turns → remove the row"
    assert run("check", "--data", bad, "--json", "-") == 2
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 4
    assert report["problems"] == [{
        "level": "error", "file": bad, "row": 4, "kind": "empty_conversation",
        "message": "the conversation has no turns → remove the row",
    }]  # fmt: skip
    assert run("check", "--data", bad, "--model", str(base), "--json", str(tmp_path / "r.json")) == 2
    assert json.loads((tmp_path / "r.json").read_text())["trained_tokens"] == 28
    assert run("check", "--data", bad, "--fix", str(tmp_path / "clean.jsonl")) == 0
    capsys.readouterr()
    assert run("check", "--data", str(tmp_path / "clean.jsonl"), "--eval", good, "--stage", "sft", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["kinds"]["leakage"] == 3
    assert run("check", "--data", "builtin:preference") == 0
    with pytest.raises(UserError, match="this stage needs sft data"):
        run("check", "--data", "builtin:preference", "--stage", "sft")
    with pytest.raises(UserError, match="nothing to look at"):
        run("check")
    with pytest.raises(UserError, match="is not possible here"):
        run("check", "--data", good, "--set", "data.max_length=long")


def test_preview_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], base: Path) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(9))
    run("preview", "--data", path, "--model", str(base), "--limit", "2", "--json", "-", "--set", "data.packing=true")
    output = json.loads(capsys.readouterr().out)
    assert [sample["row"] for sample in output["samples"]] == [1, 2]
    assert output["packs"] == [[0, 1]]
    run("preview", "--data", path, "--model", str(base), "--html", str(tmp_path / "x.html"))
    assert "<mark>answer 0" in (tmp_path / "x.html").read_text()
    run("preview", "--data", path, "--model", str(base))
    text = capsys.readouterr().out
    assert "⟦answer 28<|im_end|>⟧" in text
    assert text.startswith("⟦…⟧ is trained, the rest is only read")
    with pytest.raises(UserError, match="a preview needs a tokenizer"):
        run("preview", "--data", path)


def test_a_recipe_names_data_and_model(
    tmp_path: Path, base: Path, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe()
    assert run("check", "--recipe", str(file), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["trained_tokens"] > 0
    assert run("check", "--recipe", str(file), "--data", write(tmp_path / "y.jsonl", make_rows(2)), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
