"""Several samples in one row: less padding, the same loss.

Best-fit decreasing: the longest sample first, each into the fullest row that still has room. The rows are what
trl's padding-free collator takes: seq_lengths holds the lengths of the samples in a row, at each of which position_ids
start again and the first label is ignored. A million samples are planned in about a second.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("input_ids", "labels", "weights")
GROUP = 4096


def plan(lengths: Any, max_length: int) -> list[list[int]]:
    """Rows as lists of sample numbers, every row at most max_length long. ValueError for a longer sample."""
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into rows of {max_length}")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left -> rows
    rooms = 0  # bit r is set when a row has room r; its lowest bit from `length` up is the best fit
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
            rows[row].append(sample)
        else:
            row, room = len(rows), max_length
            rows.append([sample])
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


def pack(dataset: Any, max_length: int) -> Any:
    """Pack a tokenised dataset (input_ids, labels, and weights where there are any); other columns are left out.

    A dataset in memory gives one in memory; one on disk gives a file beside it, so that large data stays out of memory.
    """
    import datasets
    import pyarrow as pa

    if not len(dataset):
        return dataset.add_column("seq_lengths", [])
    files = dataset.cache_files
    if not files:
        return datasets.Dataset(pa.concat_tables(list(packed(dataset, max_length))))
    name = f"packed-{dataset._fingerprint}-{max_length}"
    path = Path(files[0]["filename"]).with_name(f"{name}.arrow")
    if not path.is_file():
        part = path.with_name(f"{name}.{os.getpid()}.part")
        tables = packed(dataset, max_length)
        first = next(tables)
        with pa.ipc.new_stream(part, first.schema) as sink:
            for table in itertools.chain([first], tables):
                sink.write_table(table)
        os.replace(part, path)
    return datasets.Dataset.from_file(str(path))


def lengths_of(dataset: Any) -> Any:
    """Tokens of each sample; of a dataset on disk a few thousand at a time."""
    import pyarrow.compute

    ids = dataset.select_columns(["input_ids"]).with_format("arrow")
    return np.concatenate([pyarrow.compute.list_value_length(batch["input_ids"]) for batch in ids.iter(GROUP)])


def packed(dataset: Any, max_length: int) -> Iterator[Any]:
    import pyarrow as pa

    columns = [name for name in COLUMNS if name in dataset.column_names]
    arrow, lengths = dataset.select_columns(columns).with_format("arrow"), lengths_of(dataset)
    rows = plan(lengths, max_length)
    for start in range(0, len(rows), GROUP):
        group = rows[start : start + GROUP]
        order = np.concatenate([np.asarray(row) for row in group])
        table = arrow.select(order)[:]
        sizes = lengths[order]
        ends = np.concatenate([[0], np.cumsum([len(row) for row in group])])
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)])[ends], pa.int32())
        out = {name: pa.ListArray.from_arrays(offsets, flat(table[name])) for name in columns}
        out["seq_lengths"] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(sizes, pa.int32()))
        yield pa.table(out)


def flat(column: Any) -> Any:
    """The values of a list column, one after the other."""
    import pyarrow as pa

    parts = [chunk.flatten() for chunk in column.chunks]
    return pa.concat_arrays(parts) if len(parts) != 1 else parts[0]
