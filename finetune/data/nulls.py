"""Nulls that nobody wrote: columnar tables fill every field of every turn, with null where there was none.

A null that somebody wrote ("city": null where the tool takes null) stays: rows written by hand or by a program do not
give every turn the same keys, or give them without nulls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def filled(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether these rows were exported from such a table (datasets.to_json): the objects of one place all have the same
    keys though they stand for different things, some null.

    Turns: a key that only some roles use (tool_calls: null on the user's turn). Calls: two tools with the same
    arguments, null where they are the other's. Tools: a parameter described by null.
    """
    turns: dict[str, list[dict[str, Any]]] = {}
    calls: list[tuple[Any, dict[str, Any]]] = []
    for row in rows:
        if any(None in properties(tool).values() for tool in objects(row.get("tools"))):
            return True
        for column, value in row.items():
            for turn in objects(value):
                if "role" in turn or "from" in turn:
                    turns.setdefault(column, []).append(turn)
                    calls += called(turn)
    if len({str(name) for name, _ in calls}) > 1 and alike([arguments for _, arguments in calls]):
        return True
    return any(len({str(turn.get("role", turn.get("from"))) for turn in of}) > 1 and alike(of) for of in turns.values())


def alike(values: list[dict[str, Any]]) -> bool:
    """All with the same keys in the same order, some of them null; content is null beside a call by anyone's hand."""
    nulls = {key for value in values for key, item in value.items() if item is None}
    return len({tuple(value) for value in values}) == 1 and bool(nulls - {"content", "value"})


def objects(value: Any) -> Iterator[dict[str, Any]]:
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def inside(value: Any, *keys: str) -> dict[str, Any]:
    """The object found by going down these keys, {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def properties(tool: dict[str, Any]) -> dict[str, Any]:
    return inside(tool, "function", "parameters", "properties") or inside(tool, "parameters", "properties")


def called(turn: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(name, arguments) of the calls of a turn."""
    for call in objects(turn.get("tool_calls")):
        function = inside(call, "function") or call
        if isinstance(function.get("arguments"), dict):
            yield function.get("name"), function["arguments"]
