"""One file becomes rows, recognised by its first bytes; its name only tells csv, tsv and plain text apart.

    read_file(path) -> Iterator[Row]        json list, json lines, csv, tsv, parquet, arrow, text; gzip and zstd

Everything is read as a stream: a million rows need no more memory than a few. What cannot be read comes as a Row with
its `problem`, so that all problems of a file are reported at once.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.data.json_items import CHUNK, DECODER, JsonItems, item_row, recode, rows_inside, short
from finetune.data.messages import kind_of
from finetune.data.types import Row, RowProblem
from finetune.errors import UserError

SUFFIXES = {
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".text", ".parquet", ".arrow", ".feather", ".gz", ".zst",
}  # fmt: skip


def read_file(path: Path) -> Iterator[Row]:
    """All rows of one file. UserError for an empty file or one of no known kind."""
    name = str(path)
    try:
        with path.open("rb") as raw:
            head = raw.read(8)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=name, fix="check the file's permissions") from None
    if head.startswith(b"PAR1"):
        yield from read_parquet(path)
    elif head.startswith(b"ARROW1") or head.startswith(b"\xff\xff\xff\xff"):
        yield from read_arrow(path, head.startswith(b"ARROW1"))
    else:
        try:
            with unpacked(path, head) as stream:
                yield from read_text_file(stream, name)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot be unpacked: {first_line(error)}", path=name, fix="download it again") from None


def unpacked(path: Path, head: bytes) -> Any:
    """The file's bytes, gzip and zstd undone."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # has zstd; Python's own comes with 3.14

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), CHUNK)
    if head.startswith(b"PK\x03\x04"):
        raise UserError("a zip archive or an Excel file", path=str(path), fix="unpack it, or export it as csv")
    return path.open("rb")


def read_text_file(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Json, csv or plain text."""
    head: bytes = stream.peek(65536)[:65536]  # type: ignore[attr-defined]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise UserError("the file is empty", path=name, fix="name a file with rows")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError("UTF-16 text", path=name, fix="convert it: iconv -f utf-16 -t utf-8")
    kinds = [s for s in Path(name).suffixes if s.lower() not in (".gz", ".zst")]
    suffix = kinds[-1].lower() if kinds else ""
    if looks_like_json(start, suffix):
        if start[:1] == b"[" or (start[:1] == b"{" and not one_per_line(start)):
            yield from JsonItems(codecs.getreader("utf-8-sig")(stream), name)
        else:
            yield from read_json_lines(stream, name)
    elif suffix in (".csv", ".tsv"):
        yield from read_csv(stream, name, "\t" if suffix == ".tsv" else None)
    elif b"\x00" in start[:1024]:
        raise UserError("not a data file (binary content)", path=name, fix=f"use one of {', '.join(sorted(SUFFIXES))}")
    else:
        yield from read_lines(stream, name)


def looks_like_json(start: bytes, suffix: str) -> bool:
    """By content; a name that promises json wins over a broken beginning, so that the error names the broken line."""
    if suffix in (".json", ".jsonl", ".ndjson"):
        return True
    line = start.partition(b"\n")[0].rstrip(b", \r\t")
    if start[:1] == b"{":
        return line == b"{" or line.endswith(b"}") or suffix not in (".csv", ".tsv", ".txt", ".text")
    return start[:1] == b"[" and start[1:64].lstrip()[:1] in (b"{", b"]")


def read_csv(stream: IO[bytes], name: str, delimiter: str | None) -> Iterator[Row]:
    """Row numbers count data rows from 1; cells that hold a json list or object are parsed, empty ones left out."""
    csv.field_size_limit(1 << 30)
    number = 0
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        header_line = text.readline()
        if delimiter is None:
            delimiter = max(",;\t|", key=header_line.count)
        header = next(csv.reader([header_line], delimiter=delimiter))
        columns = [column.strip() for column in header]
        if len(set(columns)) < len(columns):
            raise UserError("a column name occurs twice", path=name, line=1, fix="give every column its own name")
        for number, cells in enumerate(csv.reader(text, delimiter=delimiter, strict=True), 1):
            if not cells:
                continue
            if len(cells) != len(columns):
                what = f"{len(cells)} cells, but the header has {len(columns)}"
                yield Row({}, name, number, RowProblem("malformed_csv", what, "quote cells that hold the delimiter"))
                continue
            yield Row({c: cell_value(v) for c, v in zip(columns, cells, strict=True) if v != ""}, name, number)
    except csv.Error as error:
        yield last_row(name, number + 1, RowProblem("malformed_csv", f"not valid csv: {error}", "mend the quotes"))
    except UnicodeDecodeError as error:
        yield last_row(name, number + 1, RowProblem("not_utf8", "not UTF-8", recode(error.object)))
    finally:
        text.detach()  # the stream is closed by whoever opened it


def last_row(name: str, number: int, problem: RowProblem) -> Row:
    problem.ends_file = True
    return Row({}, name, number, problem)


def cell_value(cell: str) -> Any:
    if cell[:1] in ("[", "{") and cell[-1:] in ("]", "}"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from from_batches(batches, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"not a readable parquet file: {first_line(error)}", path=path, fix="write it again") from None


def read_arrow(path: Path, is_file: bool) -> Iterator[Row]:
    """Both forms: the file format (feather) and the stream format that datasets writes."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if is_file:
                reader = pyarrow.ipc.open_file(source)
                batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(source)
            yield from from_batches(batches, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"not a readable arrow file: {first_line(error)}", path=path, fix="write it again") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def from_batches(batches: Any, name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield Row(without_nulls(record), name, number)


def without_nulls(value: Any) -> Any:
    """Columnar files fill every field of every turn, with null where there was none."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Plain text: every line that is not blank is a document."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            try:
                yield Row({"text": decode(line).rstrip("\r\n")}, name, number)
            except RowProblem as problem:
                yield Row({}, name, number, problem)


def one_per_line(start: bytes) -> bool:
    """Whether a file that begins with an object is json lines: its first line is a whole value, or too long to tell."""
    line, newline, _ = start.partition(b"\n")
    return not newline or line.rstrip().endswith(b"}") or len(line) > 2


def decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowProblem("not_utf8", f"not UTF-8 at byte {error.start + 1}", recode(line)) from None


def parse_line(line: bytes) -> dict[str, Any]:
    text = decode(line)
    try:
        value = DECODER.decode(text.strip())
    except RecursionError:
        raise RowProblem("malformed_json", "nested too deeply", "remove the line") from None
    except ValueError as error:
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RowProblem(
            "malformed_json", f"not valid JSON: {short(error)}{column}", "mend or remove the line"
        ) from None
    if not isinstance(value, dict):
        raise RowProblem("not_an_object", f"the row is {kind_of(value)}, not an object", 'write {"column": value, …}')
    return value


def read_json_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Row numbers are line numbers; blank lines are skipped."""
    scan = DECODER.scan_once  # type: ignore[attr-defined]
    for number, line in enumerate(stream, 1):
        try:
            # The fast way, a third quicker than json.loads; what goes wrong here is looked at again for its message.
            text = line.decode()
            value, end = scan(text, 0)
            if type(value) is dict and not text[end:].strip():
                inner = rows_inside(value) if number == 1 else None
                if inner is None:
                    yield Row(value, name, number)
                else:
                    yield from (item_row(item, name, n) for n, item in enumerate(inner, 1))
                continue
        except (ValueError, StopIteration, RecursionError):
            pass
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            try:
                yield Row(parse_line(line), name, number)
            except RowProblem as problem:
                problem.raw = line.decode("utf-8", "replace").rstrip("\r\n")
                yield Row({}, name, number, problem)
