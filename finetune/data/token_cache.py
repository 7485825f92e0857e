"""Tokenised rows in a columnar table: in memory while small, in a cached file when large."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from finetune.data.types import IGNORED, Encoded
from finetune.run.writing import write_atomically

LARGE = 16 << 20  # bytes of source files from which on tokenised rows are kept on disk
FLUSH = 2000  # rows per record batch


def cache_key(files: Iterable[Path], *parts: Any) -> str:
    """Changes with the files' content, the parts and this package's code."""
    digest = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        digest.update(b"\x00")
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for part in parts:
        digest.update(repr(part).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read(path: Path) -> tuple[Any, dict[str, Any]] | None:
    """What `Writer.finish` wrote, None where it has not."""
    import datasets

    noted = path.with_suffix(".json")
    if not (path.is_file() and noted.is_file()):
        return None
    return datasets.Dataset.from_file(str(path)), json.loads(noted.read_text(encoding="utf-8"))


class Writer:
    """Collects rows; `path` is written beside its final place and moved there when it is complete. When its
    block fails the unfinished file is removed."""

    def __init__(self, path: Path | None) -> None:
        import pyarrow as pa

        self.path = path
        self.batches: list[Any] = []
        self.hashes: list[int] = []
        self.repeats: list[float] = []
        self.rows: list[Encoded] = []
        ids, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
        columns = {"input_ids": ids, "labels": ids, "weights": weights}
        marks = {"content_hash": pa.uint64(), "repeat": pa.float32(), "file": pa.uint32(), "row": pa.uint32()}
        self.schema = pa.schema({**columns, **marks})
        self.files: dict[str, int] = {}
        self.places: list[tuple[int, int]] = []
        self.weighted = False
        self.part = path.with_name(f"{path.name}.{os.getpid()}.part") if path else None
        self.sink: Any = None
        if self.part is not None:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.sink = pa.ipc.new_stream(self.part, self.schema)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        if failed is not None and self.sink is not None and self.part is not None:
            self.sink.close()
            self.part.unlink(missing_ok=True)

    def add(self, encoded: Encoded, content_hash: int, repeat: float, place: tuple[str, int] = ("", 0)) -> None:
        """place: its file and row."""
        self.places.append((self.files.setdefault(place[0], len(self.files)), place[1]))
        self.rows.append(encoded)
        self.hashes.append(content_hash)
        self.repeats.append(repeat)
        if len(self.rows) >= FLUSH:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if not self.rows:
            return
        offsets = pa.array(np.cumsum([0] + [len(r.input_ids) for r in self.rows]), pa.int32())
        self.weighted |= any(r.weights is not None for r in self.rows)
        columns = [
            pa.ListArray.from_arrays(offsets, flat([r.input_ids for r in self.rows], np.int32)),
            pa.ListArray.from_arrays(offsets, flat([r.labels for r in self.rows], np.int32)),
            pa.array([r.weights for r in self.rows], pa.list_(pa.float32())),
            pa.array(self.hashes, pa.uint64()),
            pa.array(self.repeats, pa.float32()),
            *(pa.array(column, pa.uint32()) for column in zip(*self.places, strict=True)),
        ]
        batch = pa.record_batch(columns, schema=self.schema)
        if self.sink is not None:
            self.sink.write_batch(batch)
        else:
            self.batches.append(batch)
        self.rows, self.hashes, self.repeats, self.places = [], [], [], []

    def finish(self, noted: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """All rows as a dataset, with the columns content_hash, repeat, file and row, and `noted`, which is kept beside
        them, with whether turns are weighted."""
        import datasets
        import pyarrow as pa

        self.flush()
        noted = {**noted, "weighted": self.weighted, "files": list(self.files)}
        if self.sink is None or self.path is None or self.part is None:
            batches = [filled(batch) for batch in self.batches] if self.weighted else self.batches
            return datasets.Dataset(pa.Table.from_batches(batches, self.schema)), noted
        self.sink.close()
        if self.weighted:
            second = self.part.with_suffix(".filled")
            with pa.memory_map(str(self.part)) as source, pa.ipc.new_stream(second, self.schema) as sink:
                for batch in pa.ipc.open_stream(source):
                    sink.write_batch(filled(batch))
            os.replace(second, self.part)
        write_atomically(self.path.with_suffix(".json"), json.dumps(noted))  # first: one without the other is none
        os.replace(self.part, self.path)
        return datasets.Dataset.from_file(str(self.path)), noted


def filled(batch: Any) -> Any:
    """The batch with weights 1 and 0 on rows that asked for none, beside rows that did."""
    import pyarrow as pa

    pairs = zip(batch.column("weights").to_pylist(), batch.column("labels").to_pylist(), strict=True)
    weights = [[float(x != IGNORED) for x in labels] if given is None else given for given, labels in pairs]
    at = batch.schema.get_field_index("weights")
    return batch.set_column(at, batch.schema.field(at), pa.array(weights, batch.schema.field(at).type))


def flat(lists: list[list[int]], dtype: Any) -> Any:
    import pyarrow as pa

    return pa.array(np.fromiter((x for row in lists for x in row), dtype, sum(map(len, lists))))
