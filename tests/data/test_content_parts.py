# ruff: noqa: E501  (one case per line reads best)
"""Content parts of every peer, LLaMA-Factory's newest rows among them; labels as people write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, first, system, user, write

from finetune.data import formats
from finetune.data.converters import label_of
from finetune.data.samples import read_samples
from finetune.data.types import Conversation, Preference, RowProblem
from finetune.recipe.sections import DataConfig

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def turn(role: str, *parts: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts), **more}


def text(value: Any, key: str = "value") -> dict[str, Any]:
    return {"type": "text", key: value}


def convert(row: dict[str, Any]) -> Any:
    return first(row, formats.detect([row]))


@pytest.mark.parametrize(("parts", "wanted"), [
    ([text("a")], assistant("a")),
    ([text("a", "text")], assistant("a")),
    ([text("a", "content")], assistant("a")),
    ([{"type": "output_text", "text": "a", "annotations": []}], assistant("a")),
    ([text({"value": "a", "annotations": []}, "text")], assistant("a")),
    ([{"text": "a"}], assistant("a")),
    ([text("a"), text("b")], assistant("ab")),
    ([{"type": "reasoning", "value": "t"}, text("a")], assistant("a", reasoning_content="t")),
    ([{"type": "thinking", "thinking": "t", "signature": "s"}, text("a", "text")], assistant("a", reasoning_content="t")),
    ([text("a"), {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}], assistant("a", tool_calls=[CALL])),
    ([{"type": "tool_calls", "value": '[{"name": "f", "arguments": "{\\"x\\": 1}"}]'}], assistant("", tool_calls=[CALL])),
    ([{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}] * 2, assistant("", tool_calls=[CALL, CALL])),
    ([{"type": "tool_use", "id": "i", "name": "f", "input": {"x": 1}}], assistant("", tool_calls=[{"id": "i", **CALL}])),
])  # fmt: skip
def test_parts_are_read(parts: list[Any], wanted: dict[str, Any]) -> None:
    assert convert({"messages": [turn("user", text("q")), turn("assistant", *parts)]}) == Conversation(
        [user("q"), wanted]
    )
    single = convert({"prompt": "q", "completion": parts})
    assert single == Conversation([user("q"), wanted])


def test_a_part_may_stand_alone() -> None:
    row = {"messages": [{"role": "user", "content": text("q", "text")}, turn("assistant", text("a"))]}
    assert convert(row) == Conversation([user("q"), assistant("a")])


@pytest.mark.parametrize(("parts", "message"), [
    ([{"type": "text", "txt": "a"}], "a content part of type 'text' holds no text (its keys: txt, type)"),
    ([{"type": "reasoning", "summary": "a"}], "a content part of type 'reasoning' holds no text"),
    ([text("a"), {"type": "image_url", "value": "u"}], "a content part of type 'image_url'"),
    ([text("a"), {"type": "redacted_thinking", "data": "u"}], "a content part of type 'redacted_thinking'"),
    ([{"type": "text", "text": "a", "value": "b"}], "a content part with different texts under text and value"),
    ([text("a"), {"type": "tool_call", "value": "f(x)"}], "tool call: not JSON"),
])  # fmt: skip
def test_what_is_not_read_is_named(parts: list[Any], message: str) -> None:
    with pytest.raises(RowProblem) as caught:
        convert({"messages": [turn("user", text("q")), turn("assistant", *parts)]})
    assert f"messages, turn 2{', ' if message.startswith('tool call') else ': '}{message}" in str(caught.value)


def test_reasoning_of_others_than_the_assistant_is_refused() -> None:
    with pytest.raises(RowProblem, match="turn 1: a content part of type 'reasoning'"):
        convert({"messages": [turn("user", {"type": "reasoning", "value": "t"}, text("q")), assistant("a")]})


def test_what_a_tool_returned_is_no_list_of_parts() -> None:
    result = [{"type": "hotel", "name": "A"}]
    messages = [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": result}, assistant("a")]
    assert convert({"messages": messages}).messages[2]["content"] == '[{"type": "hotel", "name": "A"}]'
    messages[2] = turn("tool", text("r"))
    assert convert({"messages": messages}).messages[2]["content"] == "r"


def test_rows_of_llama_factory() -> None:
    row = {
        "messages": [
            turn("system", text("s"), {"type": "tools", "value": '[{"name": "f", "parameters": {}}]'}, loss_weight=0.0),
            turn("user", text("q"), loss_weight=0.0),
            turn("assistant", {"type": "reasoning", "value": "t"}, text("a"), loss_weight=1.0),
            turn("user", text("r"), loss_weight=0.0),
            turn("assistant", text("b"), loss_weight=0.5),
        ],
        "_dataset_name": "d",
    }
    flags = [False, False, True, False, 0.5]
    messages = [system("s"), user("q"), assistant("a", reasoning_content="t"), user("r"), assistant("b")]
    assert convert(row) == Conversation([{**m, "train": f} for m, f in zip(messages, flags, strict=True)], [TOOL])
    pair = {
        "chosen_messages": [turn("user", text("q")), turn("assistant", text("good"))],
        "rejected_messages": [turn("user", text("q")), turn("assistant", text("bad"))],
    }
    assert convert(pair) == Preference([user("q")], [assistant("good")], [assistant("bad")])


@pytest.mark.parametrize("tools", [[TOOL["function"]], '[{"name": "f", "parameters": {}}]'])
@pytest.mark.parametrize("place", [0, 1])
def test_tools_of_any_turn_are_those_of_the_row(tools: Any, place: int) -> None:
    prompt = [system("s"), user("q")]
    prompt[place] = {**prompt[place], "tools": tools}
    for row in (
        {"messages": [*prompt, assistant("a")]},
        {"prompt": prompt, "chosen": "a", "rejected": "b"},
        {"messages": [*prompt, assistant("a")], "label": True},
    ):
        sample = convert(row)
        assert sample.tools == [TOOL]
        found = sample.messages[:2] if isinstance(sample, Conversation) else sample.prompt
        assert found == [system("s"), user("q")]
    with pytest.raises(RowProblem, match="different tools in one row"):
        convert({"messages": [*prompt, assistant("a")], "tools": [{"name": "g"}]})


@pytest.mark.parametrize(("value", "wanted"), [
    *[(v, True) for v in (True, 1, 1.0, "yes", "Yes ", "1", "+1", "1.0", "true", "TRUE", "good", "desirable", "chosen")],
    *[(v, False) for v in (False, 0, -1, -1.0, "no", "-1", "0", "0.0", "False", "bad", "undesirable", "rejected")],
    *[(v, None) for v in (None, 2, 0.5, "maybe", "", [], {})],
])  # fmt: skip
def test_labels(value: Any, wanted: bool | None, tmp_path: Path) -> None:
    assert label_of(value) is wanted
    if wanted is not None:
        path = write(tmp_path / "x.jsonl", [{"prompt": "q", "completion": "a", "label": value}])
        (item,) = read_samples(path, DataConfig(train="-"), "unpaired")
        assert item.sample is not None
        assert item.sample.label is wanted  # type: ignore[union-attr]


def test_answers_that_differ_as_json_are_two_answers() -> None:
    """Turns are shared by both transcripts only where true is true and 1 is 1."""
    calls = [assistant("", tool_calls=[{"function": {"name": "f", "arguments": {"x": x}}}]) for x in (1, True)]
    ends = [{"role": "tool", "content": "r"}, assistant("a")]
    pair = convert({"chosen": [user("q"), calls[0], *ends], "rejected": [user("q"), calls[1], *ends]})
    assert pair.prompt == [user("q")]


def test_filters_tell_true_from_one(tmp_path: Path) -> None:
    rows = [{"text": str(i), "ok": value} for i, value in enumerate((True, 1, 1.0, "1", False, 0))]
    path = write(tmp_path / "x.jsonl", rows)
    for wanted, expected in ((True, "0"), (1, "12"), ("1", "3"), (False, "4"), ([0, True], "05")):
        items = read_samples({"path": path, "filter": {"ok": wanted}}, DataConfig(train="-"), "text")
        assert "".join(item.sample.text for item in items) == expected  # type: ignore[union-attr]
