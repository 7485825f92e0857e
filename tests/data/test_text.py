"""Raw text -> blocks: nothing lost, no block that begins in the middle of a document that would fit."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import audit, fix, readers, samples
from finetune.data import text as raw
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_a_document_cut_by_the_end_of_a_block_starts_again_in_the_next():
    blocks = list(raw.pack(["abc", "defg", "hi", "jk"], encode, 6, [0]))
    assert blocks[0] == [0, *encode("abc"), 0, *encode("d")]
    assert blocks[1] == [0, *encode("defg"), 0]
    assert blocks[2][:3] == [0, *encode("hi")]


def test_a_longer_document_is_continued():
    assert list(raw.pack(["abcdefgh"], encode, 3, [0])) == [[0, 97, 98], encode("cde"), encode("fgh")]


@given(st.lists(st.text("abc", max_size=20), max_size=20), st.integers(2, 9))
def test_every_block_is_full_and_every_document_stands_in_order(texts, length):
    blocks = list(raw.pack(texts, encode, length, []))
    assert all(len(block) == length for block in blocks)
    packed = iter("".join(chr(i) for block in blocks for i in block))
    assert all(any(c == d for d in packed) for text in texts[: max(0, len(blocks) - 1) // 20] for c in text)


def test_held_out_texts_are_chosen_by_content():
    texts = [f"text {i}" for i in range(100)]
    for share, few, many in ((10, 10, 10), (0.1, 3, 20)):
        held, rest = raw.split(texts, share)
        again, _ = raw.split(texts[::-1], share)
        assert few <= len(held) <= many
        assert set(held) == set(again)
        assert sorted([*held, *rest]) == sorted(texts)
        assert raw.split(["TEXT  " + text[5:] + "." for text in texts], share)[0] == [
            "TEXT  " + text[5:] + "." for text in texts if text in held
        ]


def test_texts_come_from_a_text_column_and_nothing_else(tmp_path):
    good, other = tmp_path / "good.jsonl", tmp_path / "other.jsonl"
    good.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    assert list(raw.documents(DataConfig(train=str(good)), 0, 1)) == ["one", "two"]
    with pytest.raises(UserError, match="this stage needs text data"):
        list(raw.documents(DataConfig(train=str(other)), 0, 1))


TEXT = "\ufeffone\r\ntwo\r\n\r\n \r\nthree\n\n\n"


@pytest.mark.parametrize(
    ("unit", "found"),
    [
        ("line", [("one", 1), ("two", 2), ("three", 5)]),
        ("paragraph", [("one\ntwo", 1), ("three", 5)]),
        ("file", [("one\ntwo\n\n \nthree", 1)]),
    ],
)
def test_what_a_document_of_plain_text_is(unit, found, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8", newline="")
    (tmp_path / "b.md.txt").write_text("last", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "whole\n\nrow"}) + "\n")  # a row is always a document
    data = DataConfig(train=str(tmp_path), text_unit=unit)
    got = [(item.sample.text, item.row) for item in samples.read_samples(str(tmp_path), data, "text")]
    assert got == [*found, ("last", 1), ("whole\n\nrow", 1)]
    assert list(raw.documents(data, 0, 1)) == [text for text, _ in got]


@pytest.mark.parametrize("unit", ["paragraph", "file"])
def test_a_document_that_cannot_be_read_is_named(unit, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xffd\nrest\n\nlast\n")
    got = [(row.data.get("text"), row.row, row.problem and row.problem.kind)
           for row in readers.read_file(tmp_path / "a.txt", unit)]  # fmt: skip
    assert (None, 3, "not_utf8") in got
    if unit == "paragraph":
        assert got[0] == ("good", 1, None)
        assert got[-1] == ("last", 6, None)


def test_a_unit_where_there_is_no_plain_text_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(UserError, match="has none") as caught:
        list(raw.documents(DataConfig(train=str(file), text_unit="file"), 0, 1))
    assert caught.value.problems[0].key == "data.text_unit"


def test_one_empty_file_of_a_corpus_is_a_warning(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one\n")
    for name in ("b.txt", "c.jsonl"):
        (corpus / name).write_text("\n")
    data = DataConfig(train=str(corpus))
    pass_over = audit.Audit(data, None, "text")
    assert list(raw.documents(data, 0, 1, pass_over)) == ["one"]
    pass_over.settle()
    assert "2 files are empty" in pass_over.warnings()
    report = audit.check(data, kind="text")
    assert (report.rows, report.errors, report.kinds["empty_file"]) == (1, 0, 2)
    assert {(p["level"], Path(p["file"]).name) for p in report.problems} == {
        ("warning", "b.txt"),
        ("warning", "c.jsonl"),
    }
    kept, taken, _ = fix.mend(data, tmp_path / "clean.jsonl", kind="text")
    assert (kept, taken) == (1, 0)
    (corpus / "a.txt").write_text("")
    with pytest.raises(UserError, match="the file is empty"):
        list(raw.documents(data, 0, 1))
