"""What is wrong with a sample, without a tokenizer: the level and the kind of each finding."""

from __future__ import annotations

from typing import Any

import pytest
from chat_kit import assistant, system, user

from finetune.data.checks import check
from finetune.data.types import Conversation, Preference, Sample, Text, Unpaired

TOOL = {"role": "tool", "content": "12 degrees"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}


def kinds(sample: Sample, text: str = "") -> list[tuple[str, str]]:
    return [(found.level, found.kind) for found in check(sample, text)]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([system("s"), user("a"), assistant("b")], []),
        ([user("a"), CALL, TOOL, assistant("b")], []),
        ([], [("error", "empty_conversation")]),
        ([user("a")], [("error", "no_answer")]),
        ([user("a"), assistant("b"), user("c")], [("warning", "unanswered")]),
        ([user("a"), user("b"), assistant("c")], [("error", "wrong_order")]),
        ([user("a"), system("s"), assistant("b")], [("error", "wrong_order")]),
        ([user("a"), assistant("b"), TOOL, assistant("c")], [("warning", "stray_tool_result")]),
    ],
)
def test_the_order_of_turns(turns: list[dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    assert kinds(Conversation(turns)) == expected


def test_answers_of_pairs() -> None:
    prompt = [user("a")]
    assert kinds(Preference(prompt, [assistant("b")], [assistant("c")])) == []
    assert kinds(Preference(prompt, [assistant("b")], [assistant("b")])) == [("error", "same_answers")]
    assert kinds(Preference(prompt, [assistant("b")], [assistant(" ")])) == [("error", "empty_answer")]
    assert kinds(Preference([], [assistant("b")], [user("c")])) == [
        ("error", "empty_conversation"), ("error", "wrong_order"),
    ]  # fmt: skip
    assert kinds(Unpaired(prompt, [assistant("")], True)) == [("error", "empty_answer")]


def test_text_of_white_space() -> None:
    assert kinds(Text(" \n")) == [("error", "empty_text")]
    assert kinds(Text("x")) == []
