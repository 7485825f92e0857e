"""Nulls that a table filled in are left out, nulls that somebody wrote are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, user, write

from finetune.data.samples import read_samples
from finetune.recipe.sections import DataConfig


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


MOVE, WEATHER = call("move", {"x": 0, "y": 1}), call("weather", {"city": "B"})


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("move", x={"type": "integer"}), tool("weather", city={"enum": ["B"]})]
ROWS: dict[str, list[dict[str, Any]]] = {
    "calls in turns": [
        {"messages": [user("q"), assistant("", tool_calls=[MOVE])]},
        {"messages": [user("r"), assistant("", tool_calls=[WEATHER])]},
    ],
    "only tools": [{"prompt": "q", "completion": "a", "tools": TOOLS}],
    "two calls in an answer of one turn": [
        {"prompt": "q", "completion": [assistant("", tool_calls=[MOVE, WEATHER])]},
        {"prompt": "r", "completion": [assistant("", tool_calls=[WEATHER])]},
    ],
}  # fmt: skip


def samples(path: Any) -> list[Any]:
    return [item.sample for item in read_samples(path, DataConfig(train="-"))]


@pytest.mark.parametrize("name", ROWS)
def test_what_datasets_exports_as_json_is_read_like_its_parquet(name: str, tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS[name])
    table.to_json(tmp_path / "x.jsonl")
    table.to_parquet(tmp_path / "x.parquet")
    assert "null" in (tmp_path / "x.jsonl").read_text()
    wanted = samples(write(tmp_path / "plain.jsonl", ROWS[name]))
    assert samples(tmp_path / "x.jsonl") == samples(tmp_path / "x.parquet") == wanted


@pytest.mark.parametrize("turns", [
    [user("q"), assistant("", tool_calls=[call("weather", {"city": None})])],
    [user("q"), assistant(None, tool_calls=[call("weather", {"city": None, "day": 1})])],
    [user("q"), assistant("", tool_calls=[call("weather", {"city": None}), call("move", {"x": None})])],
])  # fmt: skip
def test_nulls_that_somebody_wrote_stay(turns: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [{"messages": turns}, {"messages": [user("q"), assistant("a")]}]
    (sample, _) = samples(write(tmp_path / "x.jsonl", rows))
    assert sample.messages[1]["tool_calls"] == turns[1]["tool_calls"]
    assert "null" in json.dumps(sample.messages)
