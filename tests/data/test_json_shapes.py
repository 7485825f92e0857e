# ruff: noqa: E501  (one case per line reads best)
"""Json of any shape gives all its rows, or an error with its place; rows are bounded in size, depth and numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from chat_kit import assistant, encoder, user, write

from finetune import json_text
from finetune.data import audit
from finetune.data.sources import read_rows
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

FIXTURES = Path(__file__).parent.parent / "fixtures" / "json_shapes"
ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(6)]
FIRST, REST = json.dumps(ROWS[:2]), [json.dumps(row) for row in ROWS[2:]]
PRETTY = [json.dumps(row, indent=2) for row in ROWS]
SHAPES = {
    "pretty": "\n".join(PRETTY),
    "pretty, nothing between": "".join(PRETTY),
    "half pretty": "".join(f'{{"prompt": "q{i}",\n "completion": "a{i}"}}\n' for i in range(6)),
    "one line": "".join(map(json.dumps, ROWS)),
    "two lists": FIRST + "\n" + json.dumps(ROWS[2:]),
    "two lists, nothing between": FIRST + json.dumps(ROWS[2:]),
    "a list per line": "".join(json.dumps(ROWS[i : i + 2]) + "\n" for i in (0, 2, 4)),
    "list, then lines": FIRST + "\n" + "\n".join(REST),
    "list, then pretty": FIRST + "\n" + "\n".join(PRETTY[2:]),
    "empty list, then lines": "[]\n" + "\n".join(map(json.dumps, ROWS)),
    "two objects of rows": json.dumps({"data": ROWS[:2]}) + "\n" + json.dumps({"data": ROWS[2:]}),
    "object of rows, then lines": json.dumps({"version": 1, "data": ROWS[:2]}) + "\n" + "\n".join(REST),
    "pretty objects of rows": json.dumps({"rows": ROWS[:2]}, indent=1) + json.dumps({"rows": ROWS[2:]}, indent=1),
}
# what stands behind good rows, and the error
BROKEN = {
    "two lists, the second not closed": (FIRST + "\n[" + ", ".join(REST), "row 6, line 2: not valid JSON: the list has no closing ']' after item 4"),
    "words behind the list": (FIRST + "\nthe end", "row 3, line 2: not valid JSON: Expecting value"),
    "a bracket too many": (FIRST + "]", "row 3, line 1: not valid JSON: Expecting value"),
    "pretty, the second broken": (PRETTY[0] + "\n{\n  'prompt': 1\n}", "row 2, line 6: not valid JSON: Expecting property name"),
    "pretty, comma between": (PRETTY[0] + ",\n" + PRETTY[1], "row 2, line 4: not valid JSON: Expecting value"),
    "list, then a broken line": (FIRST + "\n" + REST[0] + '\n{"prompt": \n', "row 4, line 4: not valid JSON"),
    "list, then a number": (FIRST + "\n7", "row 3: the row is a number, not an object"),
    "a key twice": (FIRST + '\n{"prompt": "a", "prompt": "b"}', "row 3, line 2: not valid JSON: the key 'prompt' occurs twice"),
    "a key twice in a line": (REST[0] + '\n{"prompt": "a", "prompt": "b"}', "row 2: not valid JSON: the key 'prompt' occurs twice"),
    "NaN": (FIRST + '\n{"prompt": NaN}', "row 3, line 2: not valid JSON: NaN is no JSON number"),
    "infinite": (REST[0] + '\n{"prompt": 1e999}', "row 2: not valid JSON: 1e999 is too large a number"),
    "digits": (FIRST + '\n{"prompt": ' + "1" * 5000 + "}", "row 3, line 2: not valid JSON: a number of thousands of digits"),
    "digits in a line": (REST[0] + '\n{"prompt": ' + "1" * 5000 + "}", "row 2: not valid JSON: a number of thousands of digits"),
    "deep": (FIRST + '\n{"prompt": "q", "x": ' + "[" * 101 + "]" * 101 + "}", "row 3, line 2: nested too deeply"),
    "deep in a line": (REST[0] + '\n{"prompt": "q", "x": ' + "[" * 101 + "]" * 101 + "}", "row 2: nested too deeply"),
    "deep text": (REST[0] + '\n{"prompt": "q", "completion": "a", "tools": "' + "[" * 200 + "]" * 200 + '"}', "row 2: tools: not JSON (nested too deeply)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_all_rows(name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.json_items.CHUNK", chunk)
    for file in ("x.json", "x.jsonl", "x"):
        (tmp_path / file).write_text(SHAPES[name])
        rows = list(read_rows(tmp_path / file))
        assert [row.problem for row in rows] == [None] * 6
        assert [row.data for row in rows] == ROWS
        assert len({row.row for row in rows}) == 6


@pytest.mark.parametrize(
    ("file", "count"), [("concat.json", 4), ("list_then_lines.json", 6), ("pretty_alpaca.json", 100)]
)
def test_files_of_people(file: str, count: int) -> None:
    assert len([row for row in read_rows(FIXTURES / file) if row.problem is None]) == count


def errors_of(path: Path, **settings: Any) -> list[str]:
    pass_ = audit.Audit(DataConfig(train=str(path), **settings), None, None)
    with pytest.raises(UserError) as caught:
        _ = [*pass_.rows()], pass_.settle()
    assert caught.value.exit_code == 2
    return [line.replace(str(path), "FILE") for line in caught.value.lines()]


@pytest.mark.parametrize("name", BROKEN)
def test_or_the_place(name: str, tmp_path: Path) -> None:
    text, expected = BROKEN[name]
    (tmp_path / "x.json").write_text(text)
    (line,) = errors_of(tmp_path / "x.json")
    assert f"FILE, {expected}" in line


def test_a_row_may_have_a_list_of_objects(tmp_path: Path) -> None:
    row = {"instruction": "i", "output": "o", "examples": [{"a": 1}]}
    assert [r.data for r in read_rows(write(tmp_path / "x.jsonl", [row]))] == [row]
    assert [r.data for r in read_rows(write(tmp_path / "x.jsonl", [row, row]))] == [row, row]


def large(size: int) -> dict[str, str | bytes]:
    good, long = json.dumps(ROWS[0]), json.dumps({"prompt": "x" * size, "completion": "a"})
    return {
        "x.jsonl": f"{good}\n{long}\n{good}\n",
        "x.json": f"[{good},\n{long},\n{good}]",
        "pretty.json": f"{json.dumps(ROWS[0], indent=1)}\n{long}",
        "x.csv": f"prompt,completion\nq,a\n{'x' * size},a\n",
        "open.csv": 'prompt,completion\nq,a\n"q,a\n' + "q,a\n" * size,
        "x.txt": f"a\n{'x' * size}\nb\n",
    }


@pytest.mark.parametrize("name", large(1))
def test_rows_are_bounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("json_items", "readers"):
        monkeypatch.setattr(f"finetune.data.{module}.LIMIT", 5 << 20)
    (tmp_path / name).write_text(large(6 << 20)[name])  # type: ignore[arg-type]
    (line,) = errors_of(tmp_path / name)
    assert line.startswith("FILE, row 2")
    assert "of over 5 MB" in line
    if name in ("x.jsonl", "x.txt"):  # the others end there
        pass_ = audit.Audit(DataConfig(train=str(tmp_path / name), on_error="drop", max_dropped=0.5), None, None)
        assert len([*pass_.rows()]) == 2


def test_columnar_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.readers.LIMIT", 1000)
    table = pa.Table.from_pylist([ROWS[0], {"prompt": "x" * 2000, "completion": "a"}, ROWS[1]])
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    assert [row.problem is None for row in read_rows(tmp_path / "x.parquet")] == [True, False, True]


def test_what_is_deep_enough_to_be_read_can_be_encoded(tmp_path: Path) -> None:
    """Tools and calls at the limit come through the template and the checks."""
    deep: Any = 1
    for _ in range(json_text.DEPTH - 8):
        deep = {"a": deep}
    call = {"type": "function", "function": {"name": "f", "arguments": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": deep}}}
    row = {"messages": [user("q"), assistant("", tool_calls=[call])], "tools": [tool]}
    pass_ = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", [row]), max_length=100_000), encoder(), "sft")
    assert len([*pass_.rows()]) == 1
    pass_.settle()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt", "x"])
def test_utf_16_is_named(encoding: str, name: str, tmp_path: Path) -> None:
    text = "prompt,completion\nq,a\n" if name == "x.csv" else '{"prompt": "问题", "completion": "a"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert errors_of(tmp_path / name) == ["FILE: UTF-16 text → convert it: iconv -f utf-16 -t utf-8"]


def test_equality_of_json_values() -> None:
    assert json_text.same({"a": [1, {"b": 2.0}]}, {"a": [1.0, {"b": 2}]})
    for a, b in (
        (1, True),
        (0, False),
        ([1], [True]),
        ({"a": 0}, {"a": False}),
        (None, False),
        ("1", 1),
        ([1], [1, 1]),
    ):
        assert not json_text.same(a, b)
        assert not json_text.same(b, a)
