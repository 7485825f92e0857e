"""What a person sees while training: a bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

console = Console(stderr=True)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# What learning from preferences is watched by -> its keys in the rows of DPO and KTO, and of reward models.
PAIRS = {"margin": ("rewards/margins", "margin"), "accuracy": ("rewards/accuracies", "accuracy")}


class Progress:
    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Bar | None = None
        self.task: Any = None
        self.total = self.first = self.done = 0
        self.begun = self.last = time.perf_counter()

    def start(self, total: int, done: int) -> None:
        self.total, self.first, self.done = total, done, done
        self.begun = self.last = time.perf_counter()
        if console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(compact=True),
                console=console,
                expand=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(self.description, total=total, completed=done, status="")

    def step(self, step: int) -> None:
        self.done = step
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def rate(self, tokens: float) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = tokens / max(now - self.last, 1e-9)
        self.last = now
        return round(rate, 1)

    def log(self, row: dict[str, Any]) -> None:
        parts = []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "eval_loss" in row:
            parts.append(f"held-out loss {row['eval_loss']:.4f}")
        held_out = "eval_" if "eval_loss" in row else ""
        for name, keys in PAIRS.items():
            value = next((row[held_out + key] for key in keys if held_out + key in row), None)
            if value is not None:
                parts.append(f"{name} {value:.3f}")
        if "reward_mean" in row:
            parts = [f"reward {row['reward_mean']:+.3f}", f"KL {row['kl']:.3f}", f"{row['response_length']:.0f} tokens"]
        if self.bar is None and "learning_rate" in row:
            parts.append(f"lr {row['learning_rate']:.2e}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{row['peak_memory_gb']:.1f} GB")
        if self.bar is not None:
            if "eval_loss" in row:
                console.print(f"step {row['step']}: " + "  ".join(parts))
            else:
                self.bar.update(self.task, status="  ".join(parts))
            return
        taken = self.done - self.first
        left = (time.perf_counter() - self.begun) / taken * (self.total - self.done) if taken else 0.0
        print(
            f"step {row['step']}/{self.total}  " + "  ".join(parts) + f"  ETA {duration(left)}",
            file=sys.stderr,
            flush=True,
        )

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


QUIET = 10.0  # seconds between lines where there is no terminal


@contextmanager
def task(what: str, total: int | None = None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """Say what is being done and how far it is: `with task("tokenising", len(rows)) as advance: … advance(1)`.

    On a terminal a line that goes away when it is done, with count and time left where `total` is known; elsewhere one
    line at the start, and one every ten seconds with the count.
    """
    amount = "" if total is None else f" {total:,} {unit}"
    if console.is_terminal:
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        columns += [] if total is None else [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True)]
        columns += [TimeElapsedColumn()] if total is None else []
        with Bar(*columns, console=console, transient=True) as bar:
            shown = bar.add_task(what, total=total)
            yield lambda n: bar.advance(shown, n)
        return
    note(f"{what}{amount}")
    begun = last = time.perf_counter()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.perf_counter()
        if now - last >= QUIET and total:
            last = now
            note(f"{what}: {done:,}/{total:,} {unit}  ETA {duration((now - begun) / max(done, 1) * (total - done))}")

    yield advance


def samples(title: str, rows: list[tuple[str, str, float]]) -> None:
    """A small table of prompts, replies and their scores."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for heading in ("prompt", "reply", "score"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "score" else "left")
    width = max(8, (console.width - len("│  │  │ +12.34 │")) // 2)  # rich would drop the score for want of room
    for prompt, reply, score in rows:
        answer = Text(" ".join(reply.split()))
        answer.truncate(width, overflow="ellipsis")
        table.add_row(Text(_end_of(" ".join(prompt.split()), width)), answer, f"{score:+.2f}")
    console.print(table)


def _end_of(text: str, width: int) -> str:
    """Its last columns: a prompt's question stands at its end."""
    end = text[-width:]
    while cell_len(end) > width - (len(end) < len(text)):
        end = end[1:]
    return end if end == text else "…" + end


def note(message: str) -> None:
    """One line for the user."""
    console.print(message, highlight=False, soft_wrap=True, markup=False)


def warn(message: str) -> None:
    console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True, markup=False)
