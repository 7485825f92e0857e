# ruff: noqa: E501  (a strategy a line reads best)
"""Recipes and rows that nobody thought of: whatever is given, it is taken, or refused with a UserError.

The default suite takes the same few hundred examples each time; the slow tests take thousands, by --hypothesis-seed. The
last run stands in docs/bad_inputs.md.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data import audit
from finetune.data.formats import FORMATS
from finetune.errors import UserError, render
from finetune.recipe.file import load, to_yaml
from finetune.recipe.problems import fields_of
from finetune.recipe.reading import shipped
from finetune.recipe.sections import DataConfig
from finetune.recipe.stages import RECIPES, ROWS
from finetune.resources import resource_path

FEW, MANY = 60, 1500
TEXTS = [path.read_text(encoding="utf-8") for path in shipped().values()]
KEYS = sorted({key for stage in RECIPES for keys in fields_of(stage).values() for key in keys})
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["", "1e-4", "yes", "~", "\0", "../x"]),
    st.lists(st.integers() | st.text(max_size=5), max_size=3), st.dictionaries(st.sampled_from(KEYS) | st.integers(), st.integers(), max_size=3),
)  # fmt: skip


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key and item below a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in pairs for place in ((*at, key), *places_in(part, (*at, key)))]


@st.composite
def recipes(draw: Any) -> str:
    """A shipped recipe with some of its values replaced, gone, moved or added."""
    values = copy.deepcopy(yaml.safe_load(draw(st.sampled_from(TEXTS))))
    for _ in range(draw(st.integers(1, 4))):
        *above, last = draw(st.sampled_from(places_in(values)))
        holder = values
        for key in above:
            holder = holder[key]
        change = draw(st.sampled_from(("replace", "remove", "add", "rename", "wrap")))
        if change == "replace":
            holder[last] = draw(ODD)
        elif change == "wrap":
            holder[last] = [holder[last]]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS))] = draw(ODD)
        elif change == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=8))] = holder.pop(last)
        elif change == "remove" and len(places_in(values)) > 1:
            del holder[last]
        if not places_in(values):
            break
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=False)


@st.composite
def broken(draw: Any, texts: list[str]) -> bytes:
    """A file with some of its bytes replaced, gone, doubled or added."""
    content = bytearray(draw(st.sampled_from(texts)).encode())
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        end = draw(st.integers(start, min(start + 30, len(content))))
        content[start:end] = draw(st.sampled_from([b"", bytes(content[start:end]) * 2]) | st.binary(max_size=6))
    return bytes(content)


def only_refused(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except UserError as error:
        lines = render(error)
        assert lines
        assert all(line.strip() and "\n" not in line for line in lines)
        return None


def tried(content: str | bytes, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        found = only_refused(lambda: load(str(path), None, overrides))
        if found is not None:  # what is taken can be written, and is taken again
            path.write_text(to_yaml(found), encoding="utf-8")
            load(str(path), None)


# --- rows ---

COLUMNS = ["messages", "conversations", "role", "from", "content", "value", "instruction", "input", "output", "history", "system", "prompt", "completion", "chosen", "rejected", "label", "responses", "question", "answer", "text", "tools", "tool_calls", "function", "name", "arguments", "thinking", "reasoning_content", "weight", "loss", "instances", "scores"]  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", " ", "<think>", "</think>", "<|im_end|>", "{", "\ud83d"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=4), max_leaves=12
)  # fmt: skip
ROWS_OF_ALL = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), min_size=1, max_size=4)
SAMPLES = [
    "".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:3])
    for file in sorted(resource_path("data_templates").glob("*.json*"))
]


def checked(content: bytes, kind: str, name: str = "rows.jsonl", **keys: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        only_refused(lambda: audit.screen(DataConfig(train=str(path), **keys), kind))


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


KINDS = sorted(set(ROWS.values()))
FORMAT = st.none() | st.sampled_from(sorted(FORMATS))
NAMES = st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt", "rows", "rows.parquet"])


def set_one(key: str, value: str) -> None:
    for section in ("train", "data", "model", "adapter"):
        tried(TEXTS[0], f"{section}.{key}={value}")


def of_format(content: bytes, kind: str, name: str | None) -> None:
    checked(content, kind, format=name)


STAGES = st.sampled_from(KINDS)
TRIES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "recipes": (tried, (recipes(),)),
    "bytes of recipes": (tried, (broken(TEXTS),)),
    "settings": (set_one, (st.sampled_from(KEYS) | st.text(max_size=10), st.text(max_size=30))),
    "rows": (checked, (ROWS_OF_ALL.map(lines), STAGES)),
    "rows of a format": (of_format, (ROWS_OF_ALL.map(lines), STAGES, FORMAT)),
    "bytes of rows": (checked, (broken(SAMPLES), STAGES, NAMES)),
}


def run(what: str, number: int, fixed: bool) -> None:
    """So many examples; `fixed`: the same ones each time."""
    action, parts = TRIES[what]

    @settings(max_examples=number, derandomize=fixed, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*parts))
    def one(arguments: tuple[Any, ...]) -> None:
        action(*arguments)

    one()


@pytest.mark.parametrize("what", TRIES)
def test_what_is_given_is_taken_or_refused(what: str) -> None:
    run(what, FEW, fixed=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", TRIES)
def test_thousands(what: str) -> None:
    run(what, MANY, fixed=False)
