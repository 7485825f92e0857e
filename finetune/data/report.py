"""What the audit tells: the report, and the guesses behind its histograms."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass
class Report:
    rows: int
    trained_tokens: int | None
    """None without a tokenizer."""
    problems: list[dict[str, Any]]
    """{level, file, row, kind, message}, errors first; at most the first thousands."""
    kinds: dict[str, int]
    """How often each kind of problem was found."""
    counts: dict[str, int]
    languages: dict[str, int]
    characters: dict[str, int]
    """Rows per length, by the power of two below it."""
    tokens: dict[str, int]

    @property
    def errors(self) -> int:
        return sum(problem["level"] == "error" for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


CONTROL = re.compile(
    r"<\|[a-z_][a-z0-9_]*\|>|</?s>|\[/?INST\]|<</?SYS>>|\[[gs]?MASK\]|<(?:start|end)_of_turn>|\[\|(?:Human|AI)\|\]"
    r"|<｜[^｜\s]{1,30}｜>"
)
"""Without a tokenizer: what looks like a control token of some family."""
SCRIPTS = [("ja", "\u3040-\u30ff"), ("ko", "\uac00-\ud7af"), ("zh", "\u4e00-\u9fff"), ("ru", "\u0400-\u04ff")]
SCRIPTS += [("ar", "\u0600-\u06ff"), ("th", "\u0e00-\u0e7f"), ("hi", "\u0900-\u097f")]
_SCRIPT = re.compile("|".join(f"([{chars}])" for _, chars in SCRIPTS))
_KANA = re.compile("[\u3040-\u30ff]")


def language(text: str) -> str:
    """A guess by script, for the histogram: en stands for everything in Latin letters."""
    if text.isascii():
        return "en"
    hit = _SCRIPT.search(text)
    if hit is None:
        return "en"
    name = SCRIPTS[(hit.lastindex or 1) - 1][0]
    # Japanese is written with Chinese characters, too, and may begin with one.
    return "ja" if name == "zh" and _KANA.search(text) else name


def histogram(counts: Counter[int]) -> dict[str, int]:
    """{"64-127": rows, …} from counts by bit length."""
    return {f"{1 << bits >> 1}-{(1 << bits) - 1}": counts[bits] for bits in sorted(counts)}
