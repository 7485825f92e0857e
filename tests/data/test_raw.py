"""Raw text -> blocks: nothing lost, no block that begins in the middle of a document that would fit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data import raw
from finetune.errors import UserError
from finetune.recipe import DataConfig


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
    held, rest = raw.held_out(texts, 0.1)
    again, _ = raw.held_out(texts[::-1], 0.1)
    assert len(held) == 10
    assert set(held) == set(again)
    assert sorted([*held, *rest]) == sorted(texts)


def test_texts_come_from_a_text_column_and_nothing_else(tmp_path):
    good, other = tmp_path / "good.jsonl", tmp_path / "other.jsonl"
    good.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")))
    other.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    assert list(raw.documents(DataConfig(train=str(good)), 0, 1)) == ["one", "two"]
    with pytest.raises(UserError, match="this stage needs text data"):
        list(raw.documents(DataConfig(train=str(other)), 0, 1))
