"""One file becomes rows, recognised by its first bytes; its name only tells csv, tsv and plain text apart.

Everything is read as a stream: a million rows need no more memory than a few, and one row no more than LIMIT. What
cannot be read comes as a Row with its `problem`, so that all problems of a file are reported at once.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.data.json_items import CHUNK, LIMIT, LISTS, JsonItems, item_row, no_object, recode, rows_inside, too_long
from finetune.data.nulls import without_nulls
from finetune.data.types import Row, RowProblem
from finetune.errors import UserError
from finetune.json_text import DECODER, DEPTH, decode, reason, too_deep

SUFFIXES = {
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".text", ".parquet", ".arrow", ".feather", ".gz", ".zst",
}  # fmt: skip


class EmptyFile(UserError):
    """Of several files one may be empty."""


def read_file(path: Path, unit: str = "line", whole: bool = False) -> Iterator[Row]:
    """All rows of one file. UserError for an empty file or one of no known kind.

    Args:
        unit: what of plain text is a document: line, paragraph or file.
        whole: with the empty cells of a csv file and the nulls of a table.
    """
    name = str(path)
    try:
        head = head_of(path)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=name, fix="check the file's permissions") from None
    if head.startswith(TABLES):
        yield from read_table(path, head, whole)
    else:
        try:
            with unpacked(path, head) as stream:
                yield from read_text_file(stream, name, unit, whole)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot be unpacked: {first_line(error)}", path=name, fix="download it again") from None


def head_of(path: Path) -> bytes:
    with path.open("rb") as raw:
        return raw.read(8)


def unpacked(path: Path, head: bytes) -> Any:
    """The file's bytes, gzip and zstd undone."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # has zstd; Python's own comes with 3.14

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), CHUNK)
    if head.startswith(b"PK\x03\x04"):
        raise UserError("a zip archive or an Excel file", path=str(path), fix="unpack it, or export it as csv")
    return path.open("rb", HEAD)


HEAD = 1 << 16
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # parquet, arrow's file format (feather), its stream format
# {"version": "1.0", "data": [{…}, …]}: one value that is the whole file, of any size.
WHOLE = re.compile(rb'\{[^\[{]*"(?:%s)"\s*:\s*\[\s*\{' % "|".join(sorted(LISTS)).encode())


def read_text_file(stream: IO[bytes], name: str, unit: str = "line", whole: bool = False) -> Iterator[Row]:
    """Json, csv or plain text; `whole` as in `read_file`."""
    head: bytes = stream.peek(HEAD)[:HEAD]  # type: ignore[attr-defined]
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        if head and any(part.strip() for part in iter(lambda: stream.read(CHUNK), b"")):
            raise UserError("the file begins with much white space", path=name, fix="remove it")
        raise EmptyFile("the file is empty", path=name, fix="name a file with rows")
    if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        raise UserError("UTF-32 text", path=name, fix="convert it: iconv -f utf-32 -t utf-8")
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or is_utf16(start[:1024]):
        raise UserError("UTF-16 text", path=name, fix="convert it: iconv -f utf-16 -t utf-8")
    suffix = suffix_of(name)
    if looks_like_json(start, suffix):
        one_value = bool(WHOLE.match(start))
        if start[:1] == b"[" or (start[:1] == b"{" and (one_value or not one_per_line(start))):
            yield from JsonItems(codecs.getreader("utf-8-sig")(stream), name, bounded=not one_value)
        else:
            yield from read_json_lines(stream, name)
    elif b"\x00" in start[:1024]:
        raise UserError("not a data file (binary content)", path=name, fix=f"use one of {', '.join(sorted(SUFFIXES))}")
    elif suffix in (".csv", ".tsv"):
        yield from read_csv(stream, name, "\t" if suffix == ".tsv" else None, whole)
    elif unit == "line":
        yield from read_lines(stream, name)
    else:
        yield from read_documents(stream, name, unit)


def suffix_of(name: str) -> str:
    """What the file is called without its compression."""
    kinds = [s for s in Path(name).suffixes if s.lower() not in (".gz", ".zst")]
    return kinds[-1].lower() if kinds else ""


def is_plain_text(path: Path) -> bool:
    """Whether `data.text_unit` says how the file is read."""
    head = head_of(path)
    if head.startswith(TABLES) or suffix_of(str(path)) in (".csv", ".tsv"):
        return False
    with unpacked(path, head) as stream:
        start = stream.peek(HEAD)[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip()
    return not looks_like_json(start, suffix_of(str(path)))


def is_utf16(start: bytes) -> bool:
    """UTF-16 without its mark: every second byte of its ASCII characters is zero."""
    for zeros, others in ((start[::2], start[1::2]), (start[1::2], start[::2])):
        beside = bytes(b for zero, b in zip(zeros, others, strict=False) if not zero)
        if len(beside) > 1 and 0 not in others and all(31 < b < 127 or b in b"\t\r\n" for b in beside):
            return True
    return False


def looks_like_json(start: bytes, suffix: str) -> bool:
    """By content; a name that promises json wins over a broken beginning, so that the error names the broken line."""
    if suffix in (".json", ".jsonl", ".ndjson"):
        return True
    line = start.partition(b"\n")[0].rstrip(b", \r\t")
    if start[:1] == b"{":
        return line == b"{" or line.endswith(b"}") or suffix not in (".csv", ".tsv", ".txt", ".text")
    return start[:1] == b"[" and start[1:64].lstrip()[:1] in (b"{", b"]")


def read_csv(stream: IO[bytes], name: str, delimiter: str | None, whole: bool = False) -> Iterator[Row]:
    """Row numbers count data rows from 1; every cell is text, empty ones are left out unless `whole`."""
    csv.field_size_limit(LIMIT)
    number = 0
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        header_line = text.readline(LIMIT)
        if header_line.lower().startswith("sep="):  # how Excel is told
            delimiter, header_line = header_line[4:5].strip("\r\n") or None, text.readline(LIMIT)
        if delimiter is None or delimiter not in header_line:
            delimiter = max(",;\t|", key=header_line.count)
        lines = csv.reader(itertools.chain([header_line], text), delimiter=delimiter, strict=True)
        columns = [column.strip() for column in next(lines)]
        if len(set(columns)) < len(columns):
            raise UserError("a column name occurs twice", path=name, line=1, fix="give every column its own name")
        for number, cells in enumerate(lines, 1):
            if not cells:
                continue
            if len(cells) != len(columns):
                what = f"{len(cells)} cells, but the header has {len(columns)}"
                yield Row({}, name, number, RowProblem("malformed_csv", what, "quote cells that hold the delimiter"))
                continue
            yield Row({c: v for c, v in zip(columns, cells, strict=True) if whole or v != ""}, name, number)
    except csv.Error as error:
        what = f"a cell of over {LIMIT >> 20} MB" if "field limit" in str(error) else str(error)
        yield last_row(name, number + 1, RowProblem("malformed_csv", f"not valid csv: {what}", "mend the quotes"))
    except UnicodeDecodeError as error:
        yield last_row(name, number + 1, RowProblem("not_utf8", "not UTF-8", recode(error.object)))
    finally:
        text.detach()  # the stream is closed by whoever opened it


def last_row(name: str, number: int, problem: RowProblem) -> Row:
    problem.ends_file = True
    return Row({}, name, number, problem)


def read_table(path: Path, head: bytes, whole: bool = False) -> Iterator[Row]:
    """Parquet, and both forms of arrow: the file format (feather) and the stream format that datasets writes."""
    import pyarrow
    import pyarrow.parquet

    is_parquet = head.startswith(b"PAR1")
    try:
        with (pyarrow.OSFile if is_parquet else pyarrow.memory_map)(str(path)) as source:
            if is_parquet:
                batches: Any = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1024)
            elif head.startswith(b"ARROW1"):
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(source)
            yield from from_batches(batches, str(path), whole)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"not a readable {'parquet' if is_parquet else 'arrow'} file: {first_line(error)}"
        raise UserError(what, path=path, fix="write it again") from None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def from_batches(batches: Any, name: str, whole: bool = False) -> Iterator[Row]:
    number = 0
    for batch in batches:
        large = batch.nbytes > LIMIT
        for record in records_of(batch):
            number += 1
            problem = record if isinstance(record, RowProblem) else None
            if problem is None and large and len(str(record)) > LIMIT:
                problem = too_long()
            yield Row({} if problem else record if whole else without_nulls(record), name, number, problem)


def records_of(batch: Any) -> Iterator[Any]:
    """The rows of a table's batch; the problem of a row of which Python cannot hold a value: a date after the year
    9999, an unknown time zone, text that is no UTF-8. What arrow raises for these is any kind of error."""
    try:
        yield from batch.to_pylist()
        return
    except MemoryError:
        raise
    except Exception:
        pass
    for i in range(batch.num_rows):
        record: Any = {}
        for column, values in zip(batch.schema.names, batch.columns, strict=True):
            try:
                record[column] = values[i].as_py()
            except MemoryError:
                raise
            except Exception as error:
                what = f"column {column}: a value that cannot be read ({first_line(error)})"
                record = RowProblem("unreadable_value", what, "mend the column, or leave it out")
                break
        yield record


def lines_of(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Every line with its number; of one that is too long only the beginning, which is longer than LIMIT."""
    for number in itertools.count(1):
        line = rest = stream.readline(LIMIT + 1)
        if not line:
            return
        while len(line) > LIMIT and rest and not rest.endswith(b"\n"):
            rest = stream.readline(LIMIT)
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def read_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Plain text: every line that is not blank is a document."""
    for number, line in lines_of(stream):
        if line.strip():
            try:
                yield Row({"text": decoded(line).rstrip("\r\n")}, name, number)
            except RowProblem as problem:
                yield Row({}, name, number, problem)


def read_documents(stream: IO[bytes], name: str, unit: str) -> Iterator[Row]:
    """Plain text: the whole file is a document, or every stretch between blank lines."""
    held: list[str] = []
    first = size = 0
    for number, line in itertools.chain(lines_of(stream), [(0, b"")]):
        if number and (line.strip() or (held and unit == "file")):
            if not held:
                first, size = number, 0
            try:
                size += len(line)
                if size > LIMIT:
                    raise too_long()
                held.append(decoded(line).rstrip("\r\n"))
                continue
            except RowProblem as problem:
                yield Row({}, name, number, problem)
                held = []
                if unit == "file":
                    return
                continue
        if held:
            yield Row({"text": "\n".join(held).rstrip("\n")}, name, first)
            held = []


def one_per_line(start: bytes) -> bool:
    """Whether a file that begins with an object is json lines: its first line is a whole value, or broken in itself."""
    line, newline, _ = start.partition(b"\n")
    text = start.decode("utf-8", "replace")
    try:
        _, end = DECODER.raw_decode(text)
        return "\n" not in text[:end] and text[end:].partition("\n")[0].strip()[:1] not in ("{", "[")
    except json.JSONDecodeError as error:
        # An object over several lines is read on to the end of what was looked at; a broken line breaks at its end.
        cut = error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")
        return not newline or (not cut and line.strip() != b"{")
    except (ValueError, RecursionError):
        return line.strip() != b"{"


def decoded(line: bytes) -> str:
    if len(line) > LIMIT:
        raise too_long()
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowProblem("not_utf8", f"not UTF-8 at byte {error.start + 1}", recode(line)) from None


def parse_line(line: bytes) -> dict[str, Any]:
    text = decoded(line)
    try:
        value = decode(text)
    except ValueError as error:
        what = reason(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) and error.doc else ""
        if what == "nested too deeply":
            raise RowProblem("malformed_json", what, "remove the line") from None
        raise RowProblem("malformed_json", f"not valid JSON: {what}{column}", "mend or remove the line") from None
    if not isinstance(value, dict):
        raise no_object(value)
    return value


def read_json_lines(stream: IO[bytes], name: str) -> Iterator[Row]:
    """Row numbers are line numbers; blank lines are skipped."""
    scan = DECODER.scan_once  # type: ignore[attr-defined]
    more = 0  # rows beyond the lines: of a line that holds a list of rows
    for number, line in lines_of(stream):
        value = None
        if len(line) <= LIMIT:
            try:
                # The fast way; what goes wrong here is looked at again for its message.
                text = line.decode()
                value, end = scan(text, 0)
                deep = line.count(b"[") + line.count(b"{") > DEPTH and too_deep(value)
                if deep or type(value) is not dict or text[end:].strip():
                    value = None
            except (ValueError, StopIteration, RecursionError):
                pass
        if value is not None:
            inner = rows_inside(value)
            if inner is None:
                yield Row(value, name, number + more)
            else:
                yield from (item_row(item, name, n) for n, item in enumerate(inner, number + more))
                more += len(inner) - 1
        elif line.strip():
            try:
                yield Row(parse_line(line), name, number + more)
            except RowProblem as problem:
                if len(line) <= LIMIT:
                    problem.raw = line.decode("utf-8", "replace").rstrip("\r\n")
                yield Row({}, name, number + more, problem)
