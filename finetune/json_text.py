"""JSON as it is read from people's files: strict, and bounded."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

DEPTH = 100  # what is nested deeper ends in a RecursionError somewhere: in a template, in json.dumps, in a comparison


def no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no JSON number", "", 0)


def finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise json.JSONDecodeError(f"{digits[:20]} is too large a number", "", 0)
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name in found if counts[name] > 1)
        raise json.JSONDecodeError(f"the key {twice!r} occurs twice", "", 0)
    return found


DECODER = json.JSONDecoder(parse_constant=no_constant, parse_float=finite, object_pairs_hook=unique)


def decode(text: str) -> Any:
    """The value of a text that is one. ValueError for NaN, a key that occurs twice, and nesting beyond DEPTH, too."""
    try:
        value = DECODER.decode(text.strip())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEPTH and too_deep(value):
        raise ValueError("nested too deeply")
    return value


def too_deep(value: Any, left: int = DEPTH) -> bool:
    """Whether lists and objects are nested beyond DEPTH."""
    if isinstance(value, dict | list):
        return not left or any(too_deep(v, left - 1) for v in (value.values() if isinstance(value, dict) else value))
    return False


def reason(error: Exception) -> str:
    """What is wrong, without Python's own advice."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg.removesuffix(" at")
    return "a number of thousands of digits" if str(error).startswith("Exceeds the limit") else str(error)


def same(a: Any, b: Any) -> bool:
    """1 and 1.0 are the same, true and 1 are not. Not for values beyond DEPTH."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
