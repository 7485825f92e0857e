"""What a person sees: notes, warnings and a bar on stderr, results on stdout.

Nothing is markup here (a path may hold `[x]` or `:word:`), and control characters are shown, not obeyed.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from finetune.errors import CONTROL, visible, without_secrets
from finetune.language import translated

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
console = Console(stderr=True, **PLAIN)
output = Console(**PLAIN)

# What we write ourselves, for terminals that lack it.
ALIKE = {
    "→": "->", "…": "...", "█": "#", "·": "-", "–": "-", "—": "-", "─": "-", "═": "=", "│": "|", "×": "x", "±": "+-",
    "⟦": "[[", "⟧": "]]",
}  # fmt: skip


def alike(error: UnicodeError) -> tuple[str, int]:
    """For codecs: a likeness of what cannot be encoded, else its number."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(ALIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


def settle_streams() -> None:
    """A terminal or a pipe of any encoding (ASCII, cp936, …) takes whatever is printed."""
    codecs.register_error("alike", alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="alike")


def encodable(text: str) -> bool:
    """Whether stdout takes it as it is."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def command(*parts: object) -> str:
    """`ft …` as it can be typed, whatever a path holds."""
    return shlex.join(["ft", *map(str, parts)])


def shown_name(path: str) -> str:
    """A hub id or a name as it is; of a full path the last part, since the rest is somebody's home."""
    return path if path.startswith("builtin:") or not Path(path).is_absolute() else Path(path).name


def shown_path(path: str | Path) -> str:
    """Relative to the working directory where that is shorter to type."""
    relative = os.path.relpath(path)
    relative = f"./{relative}" if relative.startswith("-") else relative  # or it would be an option
    return relative if not relative.startswith("..") else str(path)


def say(text: str, end: str = "\n", flush: bool = False) -> None:
    print(visible(text), end=end, flush=flush)


def tell(text: str) -> None:
    """A result in words of ours: one line of stdout."""
    say(translated(text))


def say_json(value: Any, indent: int | None = 2) -> None:
    """JSON that stays JSON: what a terminal would obey or cannot show is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if not encodable(CONTROL.sub("", text)):
        text = json.dumps(value, indent=indent)
    print(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def show(table: Table) -> None:
    output.print(table)


def row(table: Table, *cells: str) -> None:
    table.add_row(*map(visible, cells))


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
        self.begun = self.last = self.told = time.perf_counter()

    def start(self, total: int, done: int) -> None:
        self.total, self.first, self.done = total, done, done
        self.begun = self.last = self.told = time.perf_counter()
        if console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False), TimeRemainingColumn(compact=True),
                console=console, expand=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(translated(self.description), total=total, completed=done, status="")

    def step(self, step: int) -> None:
        self.done = step
        if self.bar is not None:
            self.bar.update(self.task, completed=step)

    def doing(self, what: str, step: int | None = None) -> None:
        """What a long step is at (default: the one after the last done); on no terminal told every ten seconds."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.task, status=translated(what))
        elif now - self.told >= QUIET:
            self.told = now
            at = translated(f"step {self.done + 1 if step is None else step}/{self.total}")
            console.print(visible(f"{at}  {translated(what)}"), soft_wrap=True)

    def rate(self, tokens: float) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = tokens / max(now - self.last, 1e-9)
        self.last = now
        return round(rate, 1)

    def log(self, row: dict[str, Any]) -> None:
        self.told = time.perf_counter()
        parts = []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if "eval_loss" in row:
            parts.append(f"{translated('held-out')} loss {row['eval_loss']:.4f}")
        held_out = "eval_" if "eval_loss" in row else ""
        for name, keys in PAIRS.items():
            value = next((row[held_out + key] for key in keys if held_out + key in row), None)
            if value is not None:
                parts.append(f"{translated(name)} {value:.3f}")
        if "reward_mean" in row:
            parts = [f"{translated('reward')} {row['reward_mean']:+.3f}", f"KL {row['kl']:.3f}"]
            parts.append(translated(f"{row['response_length']:.0f} tokens"))
        for key, value in row.items():
            if f"{key}_ci" in row and key.startswith("eval_") and key != "eval_loss":
                name = key.removeprefix("eval_").replace("_", " ")
                parts.append(f"{translated('held-out')} {name} {value:.3f}")
        if self.bar is None and "learning_rate" in row:
            parts.append(f"lr {row['learning_rate']:.2e}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        parts.append(f"{row['peak_memory_gb']:.1f} GB")
        if self.bar is not None:
            if any(key.startswith("eval_") for key in row):
                console.print("  ".join([translated(f"step {row['step']}"), *parts]))
            else:
                self.bar.update(self.task, status="  ".join(parts))
            return
        taken = self.done - self.first
        left = (time.perf_counter() - self.begun) / taken * (self.total - self.done) if taken else 0.0
        parts.append(translated(f"ETA {duration(left)}"))
        line = "  ".join([translated(f"step {row['step']}/{self.total}"), *parts])
        print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


QUIET = 10.0  # seconds between lines where there is no terminal


@contextmanager
def task(
    what: str, total: int | None = None, unit: str = "rows", after: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Say what is being done and how far it is: `with task("tokenising", len(rows)) as advance: … advance(1)`.

    On a terminal a line that goes away when it is done, with count and time left where `total` is known. Elsewhere one
    line at the start (where it takes more than `after` seconds), and one every ten seconds with what is known by then.
    """
    done, begun = 0, time.perf_counter()
    what, unit = translated(what), translated(unit)

    def advance(n: int) -> None:
        nonlocal done
        done += n

    def count() -> str:
        if total is None:
            return f"{done:,} {unit}" if done else ""
        return f"{done:,}/{total:,} {unit}"

    def left() -> str:
        taken = time.perf_counter() - begun
        return translated(f"ETA {duration(taken / done * (total - done))}") if total and done else duration(taken)

    over = threading.Event()
    first = what if total is None else f"{what} {total:,} {unit}"

    def tell() -> None:
        if after and not over.wait(after):
            note(first)
        while not over.wait(QUIET):
            note("  ".join(filter(None, [f"{what}:" if count() else what, count(), left()])).replace(":  ", ": "))

    if console.is_terminal:
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        columns += [] if total is None else [BarColumn()]
        columns += [TextColumn("{task.fields[count]}", markup=False), TextColumn("{task.fields[left]}", markup=False)]
        with Bar(*columns, console=console, transient=True) as bar:
            shown = bar.add_task(what, total=total, count=count(), left="")

            def draw() -> None:
                while not over.wait(0.2):
                    bar.update(shown, completed=done, count=count(), left=left())

            with beside(draw, over):
                yield advance
        return
    if not after:
        note(first)
    with beside(tell, over):
        yield advance


@contextmanager
def beside(work: Callable[[], None], over: threading.Event) -> Iterator[None]:
    """`work` in a thread of its own, until the block ends and `over` is set."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def samples(title: str, rows: list[tuple[str, str, float]]) -> None:
    """A small table of prompts, replies and their scores."""
    table = Table(title=translated(title), title_justify="left", show_lines=False)
    for heading in ("prompt", "reply", "score"):
        table.add_column(translated(heading), no_wrap=True, justify="right" if heading == "score" else "left")
    width = max(8, (console.width - len("│  │  │ +12.34 │")) // 2)  # rich would drop the score for want of room
    for prompt, reply, score in rows:
        prompt, reply = visible(prompt), visible(reply)
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


def note(message: str, style: str | None = None) -> None:
    """One line for the user."""
    console.print(visible(without_secrets(translated(message))), style=style, soft_wrap=True)


advising = True  # not in a part of a command: the whole says what to type next


def advise(message: str) -> None:
    """One line on what to do next."""
    if advising:
        note(message)


def warn(message: str) -> None:
    note(f"{translated('warning')}: {translated(message)}", style="yellow")
