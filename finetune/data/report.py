"""What an audit notes and tells: findings with their places, the report, and the guesses behind its histograms."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finetune.data import checks
from finetune.data.checks import Finding
from finetune.data.samples import Item
from finetune.data.types import RowProblem
from finetune.errors import Problem


@dataclass
class Report:
    rows: int
    trained_tokens: int | None
    """None without a tokenizer."""
    problems: list[dict[str, Any]]
    """{level, file, row, kind, message}, errors first; at most the first thousands."""
    kinds: dict[str, int]
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


class Noted(NamedTuple):
    level: str  # error | warning
    file: str
    row: int
    finding: Finding | RowProblem

    @property
    def line(self) -> int | None:
        return self.finding.line if isinstance(self.finding, RowProblem) else None

    def as_problem(self) -> Problem:
        return Problem(self.finding.message, path=self.file, row=self.row, line=self.line, fix=self.finding.fix)

    def as_json(self) -> dict[str, Any]:
        message = self.finding.message + (f" → {self.finding.fix}" if self.finding.fix else "")
        message = message if self.line is None else f"line {self.line}: {message}"
        return {"level": self.level, "file": self.file, "row": self.row, "kind": self.finding.kind, "message": message}


COUNTED = {
    "duplicates": "duplicate rows",
    "leaked": "rows whose prompt is in the held-out data",
    "truncated": "rows cut to data.max_length",
    "cut_away": "rows left out: nothing trained within max_length",
    "overlong_dropped": "rows left out: over data.max_length",
    "forged_markers": "turn markers inside content",
    "thinking_moved": "rows whose <think> tags became reasoning_content: the chat template does not look into content",
    "thinking_dropped": "rows without the thinking that they hold (data.thinking: drop)",
}
FOUND = {
    "empty_file": "files are empty",
    "control_token": "rows with control tokens in content (trained as plain text)",
    "unfinished_thinking": "turns whose thinking does not end",
    "untrained_turn": "turns that are not trained: the chat template writes them without the empty block of thinking",
    "same_question": "rows whose question is in the held-out data, under another system turn",
    "other_prompt": "rows with a reply that the chat template's prompt does not open (docs/data.md, What is trained)",
}
NAMED = {"unread_key": "keys that are not read", "lost_content": "fields that the chat template leaves out"}
"""Kinds of warnings whose line says of what."""
SHORT = re.compile(r"^.*: |^the chat template leaves out (the )?| of turn \d+$")  # what a warning counts as


class Notes:
    """What a pass has found: counted completely, kept one by one up to a number."""

    def __init__(self, warnings: int = sys.maxsize, errors: int = sys.maxsize) -> None:
        """How many to keep: warnings of each kind, rows with errors."""
        self.kept_warnings, self.kept_errors = warnings, errors
        self.problems: list[Noted] = []
        self.kinds: Counter[str] = Counter()
        self.named: dict[str, Counter[str]] = {kind: Counter() for kind in NAMED}
        self.bad_rows: set[tuple[str, int]] = set()
        self.cut_off: list[Problem] = []
        """Files that could not be read to their end."""

    def add(self, level: str, item: Item, finding: Finding | RowProblem) -> None:
        noted = Noted(level, item.file, item.row, finding)
        self.kinds[finding.kind] += 1
        if level == "error":
            self.bad_rows.add((item.file, item.row))
            if isinstance(finding, RowProblem) and finding.ends_file:
                self.cut_off.append(noted.as_problem())
            if len(self.bad_rows) <= self.kept_errors:
                self.problems.append(noted)
            return
        if finding.kind in NAMED:
            self.named[finding.kind][SHORT.sub("", finding.message)] += 1
        if self.kinds[finding.kind] <= self.kept_warnings:
            self.problems.append(noted)

    def warn(self, item: Item, kind: str, message: str, fix: str | None = None) -> None:
        self.add("warning", item, checks.warning(kind, message, fix))

    def errors(self) -> list[Problem]:
        return [noted.as_problem() for noted in self.problems if noted.level == "error"]

    def of(self, *kinds: str) -> list[Problem]:
        return [noted.as_problem() for noted in self.problems if noted.finding.kind in kinds]

    def lines(self, counts: Mapping[str, int]) -> list[str]:
        """One line per kind of warning; `counts` are those of the pass."""
        lines = [f"{counts[name]:,} {what}" for name, what in COUNTED.items() if counts.get(name)]
        lines += [f"{self.kinds[kind]:,} {what}" for kind, what in FOUND.items() if self.kinds[kind]]
        for kind, what in NAMED.items():
            if self.kinds[kind]:
                names = [name for name, _ in self.named[kind].most_common(6)]
                lines.append(f"{self.kinds[kind]:,} {what}: {', '.join([*names[:5], *('…' for _ in names[5:])])}")
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows):,} rows left out: they cannot be used")
        return lines


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
