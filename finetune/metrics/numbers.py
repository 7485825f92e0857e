"""Answers that are numbers, at the end of a reasoning or behind GSM8K's ####. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from finetune.metrics.metric import Row

# 1,234.5  -7  .5  6e3; a hyphen between numbers (16-3) is no sign, and 1,2 are two numbers.
NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:e[-+]?\d{1,3}(?!\d))?",
    re.IGNORECASE,
)
MARK = "####"
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("−"): "-"}  # not all of NFKC: m² has no number


def number_match(prediction: str, reference: str) -> bool | None:
    """Whether both give the same number; None where the reference has none."""
    expected = final_number(reference)
    return None if expected is None else final_number(prediction) == expected


def final_number(text: str) -> Decimal | None:
    """The number behind the first ####, else the last one of the text; 1,234 is 1234.0."""
    plain = text.translate(WIDE)
    _, marked, behind = plain.partition(MARK)
    found = NUMBER.search(behind.partition("\n")[0]) if marked else None
    every = [found[0]] if found is not None else NUMBER.findall(plain)
    return Decimal(every[-1].replace(",", "")) if every else None


def are_marked(rows: Sequence[Row]) -> bool:
    """Whether most references have a number behind ####."""
    texts = [row["reference"] for row in rows if row.get("reference") is not None]
    marked = sum(MARK in text and NUMBER.search(text.partition(MARK)[2]) is not None for text in texts)
    return bool(texts) and 2 * marked > len(texts)
