"""What can be wrong in the options of `ft eval`, found without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.metrics import asked
from finetune.places import check_file, json_with
from finetune.run.writing import read_lines


def check(
    runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None, data: str | None,
    json_file: str | None, quantization: str | None, predictions: str | None, named: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """UserError for options that exclude each other, and for files that cannot be written."""
    if json_file not in (None, "-"):
        check_file(Path(str(json_file)), "--json", json_with("runs", "comparisons"))
    if predictions is not None:
        check_file(Path(predictions), "--predictions", is_predictions)
        for key, other in (("--json", json_file), ("--data", data)):
            if other not in (None, "-") and Path(str(other)).resolve() == Path(predictions).resolve():
                raise UserError(f"is the file of {key}", path=predictions, key="--predictions", fix="name another file")
    if sum((bool(runs), recipe is not None, adapter is not None)) > 1:
        raise UserError("runs, --recipe and --adapter exclude each other", fix="give one of them")
    if not (runs or recipe is not None or adapter is not None or model is not None):
        raise UserError("nothing to evaluate", fix="give a run directory, --recipe, or --model")
    quantizations(quantization)
    if named is not None and not named:
        raise UserError("names no metric", key="--metrics", fix="leave it out, or name one")
    asked.check(named or (), "--metrics")


def is_predictions(path: Path) -> bool:
    """Whether a file is one of --predictions: every line a row of a run."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except ValueError:
        return False
    if not (isinstance(row, dict) and {"run", "row", "loss"} <= row.keys()):
        return False
    return all({"run", "row"} <= row.keys() for row in read_lines(path))


def quantizations(text: str | None) -> list[str]:
    """`none,int8,int4` as a list."""
    kinds = [kind.strip() for kind in text.split(",")] if text else []
    for kind in kinds:
        if kind not in ("none", "int8", "int4"):
            raise UserError(f"unknown kind {kind!r}", key="--quantization", fix="a list of none, int8, int4")
    return kinds


def refuse(given: dict[str, Any], why: str) -> None:
    """UserError that names an option without effect."""
    for key, value in given.items():
        if value:
            raise UserError(f"has no effect: {why}", key=key, fix="leave it out")
