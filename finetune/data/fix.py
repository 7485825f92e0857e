"""`ft data check --fix OUT`: the clean rows in one file, the others with their reasons in another.

Rows are copied as they were read; nothing is rewritten inside them, and the source is never touched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from finetune.data import sources
from finetune.data.audit import Audit
from finetune.data.encoder import Encoder
from finetune.data.samples import specs
from finetune.errors import UserError
from finetune.places import check_writable, fresh
from finetune.recipe.sections import DataConfig


def mend(
    config: DataConfig, out: Path, encoder: Encoder | None = None, kind: str | None = "sft", eval_data: Any = None
) -> tuple[int, int, Path]:
    """Write OUT (json lines) and OUT's name with .rejects.jsonl. UserError when one of them exists.

    Returns (rows kept, rows taken out, file of rejects).
    """
    check_free(out)
    listed = specs(config)
    if len(listed) > 1:
        raise UserError("--fix takes one source", key="--fix", fix="run it once per source, with --data")
    audit = Audit(config, encoder, kind, eval_data, list_all=True)
    for _ in audit.rows():
        pass
    if audit.notes.cut_off:
        raise UserError(audit.notes.cut_off)
    reasons = rejects(audit)
    parts = [fresh(file) for file in files(out)]
    kept = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with parts[0].open("x", encoding="utf-8") as clean, parts[1].open("x", encoding="utf-8") as rejected:
            for row in sources.read_rows(listed[0], unit=config.text_unit):
                if row.problem is not None and row.problem.kind == "empty_file":
                    continue
                why = reasons.get((row.file, row.row))
                if why is None and row.problem is None:
                    write(clean, row.data)
                    kept += 1
                else:
                    data = row.data if row.problem is None else row.problem.raw
                    write(rejected, {"file": row.file, "row": row.row, "reasons": why, "data": data})
        check_free(out)
        for part, file in zip(parts, files(out), strict=True):
            os.replace(part, file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return kept, len(reasons), files(out)[1]


def rejects(audit: Audit) -> dict[tuple[str, int], list[str]]:
    """(file, row) -> why, of every row that is taken out: errors, duplicates, leaks, nothing left to train."""
    out: dict[tuple[str, int], list[str]] = {}
    for level, file, row, finding in audit.notes.problems:
        if level == "error" or finding.kind in ("leakage", "cut_away"):
            out.setdefault((file, row), []).append(finding.message)
    for again, (file, row) in audit.duplicates.found():
        out.setdefault(again, []).append(f"the same as {file}, row {row}")
    return out


def files(out: Path) -> tuple[Path, Path]:
    """(clean rows, rejects)."""
    return out, out.with_name(f"{out.name.removesuffix('.jsonl')}.rejects.jsonl")


def check_free(out: Path) -> None:
    """UserError when OUT cannot be written, or would replace anything."""
    if not out.name or "\0" in str(out):
        raise UserError("is no file", path=out, key="--fix", fix="name a new file")
    for file in files(out):
        if os.path.lexists(file):
            raise UserError("this file exists", path=file, key="--fix", fix="name a new file")
    check_writable(out.parent.resolve(), "--fix")


def write(stream: IO[str], value: Any) -> None:
    # Half surrogate pairs cannot be written as UTF-8; only such rows are escaped.
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    stream.write(text + "\n")
