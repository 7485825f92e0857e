"""Answers that are JSON. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune.json_text import decode, same, too_deep
from finetune.metrics.metric import Row


def json_fields(prediction: str, reference: str) -> dict[str, bool] | None:
    """Which fields of a JSON object are right; None if the reference is not a JSON object."""
    expected = json_object(reference)
    if expected is None:
        return None
    given = json_object(prediction) or {}
    return {key: key in given and same(given[key], value) for key, value in expected.items()}


def json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return None
    return value if isinstance(value, dict) and not too_deep(value) else None


def json_valid(row: Row) -> float | None:
    """Whether the answer is one JSON value with nothing around it, strictly: no NaN, no key twice. None where the
    reference is something else."""
    if row.get("prediction") is None or not (row.get("reference") is None or is_json(row["reference"])):
        return None
    return float(is_json(row["prediction"]))


def is_json(text: str) -> bool:
    try:
        decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def fields(row: Row) -> dict[str, bool]:
    """Which fields of a JSON reference are right; {} where it is none."""
    if row.get("reference") is None or row.get("prediction") is None:
        return {}
    return json_fields(row["prediction"], row["reference"]) or {}


def has_json(rows: Sequence[Row]) -> bool:
    """Whether a reference is a JSON object."""
    return any(row.get("reference") is not None and json_object(row["reference"]) is not None for row in rows)
