"""`ft data check --fix OUT`: the clean rows in one file, the others with their reasons in another.

    mend(config, out, …) -> (rows kept, rows taken out, file of rejects)

Rows are copied as they were read; nothing is rewritten inside them, and the source is never touched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from finetune.data import sources
from finetune.data.audit import Audit
from finetune.data.samples import specs
from finetune.data.types import Row
from finetune.errors import UserError


def mend(
    config: Any, out: Path, encoder: Any = None, kind: str | None = "sft", eval_data: Any = None
) -> tuple[int, int, Path]:
    """Write OUT (json lines) and OUT's name with .rejects.jsonl. UserError when one of them exists."""
    rejects_file = out.with_name(f"{out.name.removesuffix('.jsonl')}.rejects.jsonl")
    listed = specs(config)
    if len(listed) > 1:
        raise UserError("--fix takes one source", key="--fix", fix="run it once per source, with --data")
    for file in (out, rejects_file):
        if file.exists():
            raise UserError("this file exists", path=file, key="--fix", fix="name a new file")
    audit = Audit(config, encoder, kind, eval_data)
    audit.listed = (sys.maxsize, sys.maxsize)
    for _ in audit.rows():
        pass
    if audit.cut_off:
        raise UserError(audit.cut_off)
    reasons = audit.rejects()
    parts = [file.with_name(f"{file.name}.{os.getpid()}.part") for file in (out, rejects_file)]
    kept = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with parts[0].open("w", encoding="utf-8") as clean, parts[1].open("w", encoding="utf-8") as rejected:
        for row in rows_of(listed[0]):
            why = reasons.get((row.file, row.row))
            if why is None and row.problem is None:
                write(clean, row.data)
                kept += 1
            else:
                data = row.data if row.problem is None else row.problem.raw
                write(rejected, {"file": row.file, "row": row.row, "reasons": why, "data": data})
    os.replace(parts[0], out)
    os.replace(parts[1], rejects_file)
    return kept, len(reasons), rejects_file


def rows_of(spec: dict[str, Any]) -> Iterator[Row]:
    yield from sources.read_rows(spec)


def write(stream: IO[str], value: Any) -> None:
    # Half surrogate pairs cannot be written as UTF-8; only such rows are escaped.
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    stream.write(text + "\n")
