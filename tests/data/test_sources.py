"""The same rows from every kind of file and place; row numbers; hub datasets from stand-ins, without a network."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from chat_kit import assistant, user, write

from finetune.data.samples import read_samples
from finetune.data.sources import files_of, is_hub, read_rows
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig, SourceConfig

ROWS: list[dict[str, Any]] = [{"question": f"问 {i}", "answer": f'a,{i}\n"x"'} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def as_csv(delimiter: str) -> bytes:
    quoted = "\n".join(delimiter.join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in ROWS)
    return f"question{delimiter}answer\n{quoted}\n".encode()


def arrow(path: Path) -> None:
    with pa.ipc.new_stream(path, TABLE.schema) as sink:
        sink.write_table(TABLE)


def zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as sink:
        sink.write(LINES.encode())


TABLE = pa.Table.from_pylist(ROWS)
KINDS: dict[str, Any] = {
    "x.jsonl": LINES.encode(),
    "no line break at the end.jsonl": LINES.rstrip("\n").encode(),
    "blank lines.jsonl": LINES.replace("\n", "\n\n").encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "x.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines called.json": LINES.encode(),
    "list called.jsonl": json.dumps(ROWS, indent=1).encode(),
    "inside data.json": json.dumps({"version": 1, "data": ROWS}, indent=2).encode(),
    "inside, one line.json": json.dumps({"data": ROWS}).encode(),
    "renamed": LINES.encode(),
    "renamed.dat": json.dumps(ROWS).encode(),
    "renamed.txt": LINES.encode(),
    "x.csv": as_csv(","),
    "semicolon.csv": as_csv(";"),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(","),
    "x.tsv": as_csv("\t"),
    "x.jsonl.gz": gzip.compress(LINES.encode()),
    "gz called.jsonl": gzip.compress(LINES.encode()),
    "x.csv.gz": gzip.compress(as_csv(",")),
    "x.jsonl.zst": zstd,
    "x.parquet": lambda path: pa.parquet.write_table(TABLE, path),
    "parquet called.bin": lambda path: pa.parquet.write_table(TABLE, path),
    "x.feather": lambda path: pa.feather.write_feather(TABLE, path),
    "x.arrow": arrow,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path, content = tmp_path / name, KINDS[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    rows = list(read_rows(path))
    assert [row.data for row in rows] == ROWS
    assert [row.problem for row in rows] == [None] * 5
    assert [row.row for row in rows] == ([1, 3, 5, 7, 9] if name.startswith("blank") else [1, 2, 3, 4, 5])
    assert {row.file for row in rows} == {str(path)}


def test_columnar_files_do_not_fill_turns_with_nulls(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [row.data for row in read_rows(tmp_path / "x.parquet")] == rows


def test_csv_cells_hold_json_where_a_list_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    turns = [user("[x"), assistant("{}")]
    cell = json.dumps(turns).replace('"', '""')
    path.write_text(f'messages,id\n"{cell}",[broken\n', encoding="utf-8")
    assert next(read_rows(path)).data == {"messages": json.dumps(turns), "id": "[broken"}
    assert only(path).messages == turns
    path.write_text(f'talk,id\n"{cell}",3\n', encoding="utf-8")
    assert only(path, columns={"messages": "talk"}).messages == turns
    path.write_text(f'chosen,rejected\n"{cell}","{cell.replace("{}", "no")}"\n', encoding="utf-8")
    assert only(path, "preference").rejected == [assistant("no")]
    path.write_text('prompt,responses,scores\nq,"[""a"", ""b""]","[1, 2]"\n', encoding="utf-8")
    assert only(path, "preference").chosen == [assistant("b")]
    path.write_text('messages\n"[{""role"": ""user"",}]"\n', encoding="utf-8")
    item = next(read_samples(path, DataConfig(train="-", format="messages")))
    assert "messages: not JSON (Expecting property name" in str(item.problem)


def only(path: Path, kind: str = "sft", **settings: Any) -> Any:
    """The sample of a file with one row."""
    (item,) = read_samples(path, DataConfig(train="-", **settings), kind)
    assert item.problem is None
    return item.sample


@pytest.mark.parametrize("cell", [
    '{"name": "Ann", "age": 20}', "[1, 2]", '[{"role": "user", "content": "n0"}]', '[{"role": "tech"}]', '["a", "b"]',
    '[{"role": "assistant", "content": "n0"}]', "42", "true", "null",
])  # fmt: skip
@pytest.mark.parametrize("header", ["prompt,completion", "instruction,output", "question,answer", "inputs,targets"])
def test_csv_cells_that_look_like_json_are_text_where_text_is_meant(tmp_path: Path, cell: str, header: str) -> None:
    quoted = '"' + cell.replace('"', '""') + '"'
    (tmp_path / "x.csv").write_text(f"{header}\n{quoted},{quoted}\n", encoding="utf-8")
    assert only(tmp_path / "x.csv").messages == [user(cell), assistant(cell)]


def test_a_long_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items, numbers and strings that are cut by the end of a piece are put together; lines are counted on."""
    monkeypatch.setattr("finetune.data.json_items.CHUNK", 7)
    rows = [{"text": "x" * n, "n": n * 1000, "deep": [[{"a": ']},{["' * n}]]} for n in range(30)]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert [row.data for row in read_rows(tmp_path / "x.json")] == rows
    (tmp_path / "y.json").write_text(json.dumps(rows, indent=1)[:-2] + ',\n{"text" 1}]')
    *good, bad = read_rows(tmp_path / "y.json")
    assert [row.data for row in good] == rows
    assert bad.row == 31
    assert bad.problem is not None
    assert bad.problem.line == json.dumps(rows, indent=1).count("\n") + 1


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/c.jsonl"):
        write(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    assert [row.data["text"] for row in read_rows(tmp_path)] == ["a.jsonl", "b/c.jsonl"]
    assert [row.data["text"] for row in read_rows(f"{tmp_path}/*.jsonl")] == ["a.jsonl"]
    assert [f.name for f in files_of(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "c.jsonl"]


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "t"}])
    with pytest.raises(UserError, match=r"trian.jsonl: no such file → did you mean .*train.jsonl\?"):
        list(read_rows(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="no file matches this pattern"):
        list(read_rows(f"{tmp_path}/*.csv"))
    with pytest.raises(UserError, match=r"no such built-in data → did you mean builtin:alpaca\?"):
        list(read_rows("builtin:alpacca"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no data files"):
        list(read_rows(tmp_path / "empty"))


def test_builtin_samples_have_names() -> None:
    assert next(read_rows("builtin:alpaca")).data["input"] == "今天的快递已经送到前台。"
    assert files_of("builtin:preference/sharegpt")[0].name == "preference_sharegpt.json"


def texts(spec: Any, **settings: Any) -> list[str]:
    items = read_samples(spec, DataConfig(train="-", **settings), "text")
    return [item.sample.text for item in items]  # type: ignore[union-attr]


def test_filters_and_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": str(i), "lang": "zh" if i % 2 else "en", "n": i} for i in range(100)])
    assert texts(SourceConfig(path=path, filter={"lang": "zh"}))[:3] == ["1", "3", "5"]
    assert texts({"path": path, "filter": {"lang": ["zh", "en"], "n": [4, 7]}}) == ["4", "7"]
    assert texts(path, max_samples=3) == ["0", "1", "2"]
    assert texts(SourceConfig(path=path, max_samples=2), max_samples=3) == ["0", "1"]
    drawn = texts(path, max_samples=10, shuffle=True)
    assert len(set(drawn)) == 10
    assert drawn == sorted(drawn, key=int)
    assert drawn != texts(path, max_samples=10)
    assert drawn == texts(path, max_samples=10, shuffle=True)


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub({"path": "owner/dataset"})
    assert is_hub({"path": "squad", "source": "hub"})
    assert is_hub({"path": "data/x", "split": "train"})
    assert not is_hub({"path": "data/x"})  # the folder exists, so this is a misspelt path
    assert not is_hub({"path": "owner/dataset.jsonl"})
    assert not is_hub({"path": "./owner/dataset"})
    assert not is_hub({"path": "/owner/dataset"})


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, **more: Any) -> list[dict[str, Any]]:
        asked.append((path, name, more))
        return [{"question": "q", "answer": "a", "context": None}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = SourceConfig(path="owner/data", name="zh", split="test", revision="v1")
    items = list(read_samples(spec, DataConfig(train="-", streaming=True)))
    assert asked == [("owner/data", "zh", {"split": "test", "revision": "v1", "streaming": True})]
    assert (items[0].file, items[0].row) == ("owner/data[test]", 1)
    assert items[0].sample.messages == [user("q"), assistant("a")]  # type: ignore[union-attr]
    list(read_samples("owner/data", DataConfig(train="-")))
    assert asked[1] == ("owner/data", None, {"split": "train", "revision": None, "streaming": False})


def test_an_unreachable_hub_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = r"owner/data\[train\]: is neither here nor in the cache, and the hub is not asked: HF_HUB_OFFLINE is set →"
    with pytest.raises(UserError, match=said):
        list(read_rows("owner/data"))


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="reading from ModelScope needs its client → pip install modelscope"):
        list(read_rows({"path": "owner/data", "source": "modelscope"}))
    write(tmp_path / "train.jsonl", [{"text": "train"}])
    write(tmp_path / "test.jsonl", [{"text": "test"}])
    asked = []
    client = types.ModuleType("modelscope.hub.snapshot_download")

    def dataset_snapshot_download(path: str, revision: str) -> str:
        asked.append((path, revision))
        return str(tmp_path)

    client.dataset_snapshot_download = dataset_snapshot_download  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", client)
    spec = {"path": "owner/data", "source": "modelscope", "split": "train"}
    assert [row.data["text"] for row in read_rows(spec)] == ["train"]
    assert asked == [("owner/data", "master")]


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("a date past the last", pa.array([1, 1 << 62], pa.timestamp("us"))),
        ("a span past the longest", pa.array([1, 1 << 62], pa.duration("s"))),
        ("a day past the last", pa.array([1, 1 << 30], pa.int32()).cast(pa.date32())),
        ("text that is no UTF-8", pa.Array.from_buffers(
            pa.string(), 2, [None, pa.py_buffer(struct.pack("<iii", 0, 1, 2)), pa.py_buffer(b"a\xff")])),
    ],
)  # fmt: skip
def test_a_value_that_python_cannot_hold_is_told_with_its_row(tmp_path: Path, name: str, column: Any) -> None:
    table = pa.table({"instruction": ["q", "p"], "output": ["a", "b"], "when": column})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    good, bad = read_rows(tmp_path / "rows.parquet")
    assert (good.problem, good.data["instruction"]) == (None, "q")
    assert bad.row == 2
    assert bad.problem is not None
    assert "column when: a value that cannot be read" in bad.problem.message


def test_an_unknown_time_zone_is_told(tmp_path: Path) -> None:
    when = pa.array([0], pa.timestamp("us", tz="Mars/Olympus"))
    table = pa.table({"instruction": ["q"], "output": ["a"], "when": when})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert row.problem is not None
    assert row.problem.message.startswith("column when: a value that cannot be read")


@pytest.mark.parametrize(
    ("column", "kind"), [(pa.array([b"q"]), "bytes"), (pa.array([0], pa.date32()), "a date")], ids=["bytes", "date"]
)
def test_a_value_of_a_table_is_called_what_it_is(tmp_path: Path, column: Any, kind: str) -> None:
    pa.parquet.write_table(pa.table({"instruction": column, "output": ["a"]}), tmp_path / "rows.parquet")
    (item,) = read_samples(tmp_path / "rows.parquet", DataConfig(train="-"), None)
    assert item.problem is not None
    assert item.problem.message == f"instruction is {kind}, not text"


def test_text_of_four_bytes_a_character(tmp_path: Path) -> None:
    for order in ("utf-32-le", "utf-32-be"):
        (tmp_path / "rows.jsonl").write_bytes('\ufeff{"instruction": "q", "output": "a"}\n'.encode(order))
        with pytest.raises(UserError, match=r"UTF-32 text → convert it: iconv -f utf-32"):
            list(read_rows(tmp_path / "rows.jsonl"))


def test_a_file_is_read_once_however_often_a_pattern_finds_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    write(tmp_path / "a" / "b" / "rows.jsonl", [{"instruction": "q", "output": "a"}])
    assert files_of(f"{tmp_path}/**/**/*.jsonl") == [tmp_path / "a" / "b" / "rows.jsonl"]


def test_excel_s_line_may_name_no_delimiter(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("sep=\ninstruction,output\nq,a\n")
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row.data == {"instruction": "q", "output": "a"}
