"""Errors and how they are shown.

    FinetuneError          anything `ft` raises on purpose
      UserError            exit 2: the recipe, the data or the arguments can be mended by the user
      RunError             exit 1: a run failed in a way that is explained (diverged, parity gate, …)
      Interrupted          exit 130: SIGINT or SIGTERM, a checkpoint was saved

Everything else that escapes is a bug: exit 1, traceback with --debug. `render` is the only place that prints errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (path, row or line, key), and how to mend it."""

    message: str
    path: str | Path | None = None
    row: int | None = None
    line: int | None = None
    key: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        """One line: `path, row 3: key: message: fix`."""
        where = []
        if self.path is not None:
            where.append(str(self.path))
        if self.row is not None:
            where.append(f"row {self.row}")
        if self.line is not None:
            where.append(f"line {self.line}")
        parts = [", ".join(where)] if where else []
        if self.key is not None:
            parts.append(self.key)
        parts.append(self.message)
        text = ": ".join(parts)
        if self.fix:
            text += f" → {self.fix}"
        return " ".join(text.split("\n")).strip()


class FinetuneError(Exception):
    exit_code = 1

    def lines(self) -> list[str]:
        return [str(self)]


class UserError(FinetuneError):
    """Bad input. `UserError("message", path=…, row=…, fix=…)` or `UserError([Problem(…), …])`."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Sequence[Problem], /, **where: str | Path | int | None) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, **where)]  # type: ignore[arg-type]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = list(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        return [str(problem) for problem in self.problems]


class RunError(FinetuneError):
    exit_code = 1


class Interrupted(FinetuneError):
    exit_code = 130


MOST_LINES = 20  # a broken million-row file must not scroll the cause away


def render(error: FinetuneError) -> list[str]:
    """The lines to print on stderr, one per problem, the tail counted instead of shown."""
    lines = error.lines()
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"… and {len(lines) - MOST_LINES} more problems"]
    return lines
