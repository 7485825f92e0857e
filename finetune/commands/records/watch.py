"""`ft runs watch`: the curve of a run and its last samples, until it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.live import Live
from rich.text import Text

from finetune.commands.records import found, status_of
from finetune.errors import visible
from finetune.language import translated
from finetune.run import records
from finetune.run.records import Record
from finetune.run.writing import read_lines
from finetune.terminal.progress import command, duration, encodable, output, say, shown_path, tell
from finetune.terminal.values import shown

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Of a Braille character, which is two dots wide and four high: the bits of each row, from above."""
SHOWN = ("loss", "eval_loss", "reward_mean", "kl", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb")
ROWS_HIGH = 10
SAMPLES = 4


def watch(name: str, interval: float = 2.0) -> None:
    """Until the run ends. On a terminal a curve that is drawn anew, elsewhere a line for each row of metrics.jsonl."""
    record = found(name)
    if not output.is_terminal:
        follow(record, interval)
    else:
        with Live(console=output, auto_refresh=False, transient=True) as live:
            while record.status == "running":
                live.update(screen(record, output.width), refresh=True)
                time.sleep(interval)
                record = records.read(record.path)
        output.print(screen(record, output.width))
    if (after := next_command(record)) is not None:
        tell(after)


def follow(record: Record, interval: float) -> None:
    told = 0
    while True:
        ended = record.status != "running"  # asked first: what is written meanwhile is read now
        rows = read_lines(record.run.metrics)
        for row in rows[told:]:
            say(line(row), flush=True)
        told = len(rows)
        if ended:
            for asked, answer in last_samples(record):
                say(asked if answer is None else f"{asked} → {answer}")
            say(status_of(record))
            return
        time.sleep(interval)
        record = records.read(record.path)


def next_command(record: Record) -> str | None:
    if record.status in ("interrupted", "failed") and record.run.last_checkpoint() is not None:
        again = command(record.stage, "--recipe", shown_path(record.path / "recipe.yaml"), "--resume")
        return f"go on with {again}"
    return None


def line(row: dict[str, Any]) -> str:
    """A row of metrics.jsonl in one line."""
    values = {key: row[key] for key in row if key in SHOWN or key.startswith("eval_") or key == "epoch"}
    parts = [f"{key} {shown(value)}" for key, value in values.items() if records.is_number(value)]
    return "  ".join([at_step(row.get("step")), *parts])


def screen(record: Record, width: int) -> Group:
    """Title, curve, last row, last samples."""
    rows = record.metrics
    took = "" if record.seconds is None else f", {duration(record.seconds)}"
    parts = [Text(visible(f"{shown_path(record.path)}: ft {record.stage}, {status_of(record)}{took}"), "bold")]
    key = "reward_mean" if any("reward_mean" in row for row in rows) else "loss"
    points = [(row["step"], row[key]) for row in rows if records.is_number(row.get(key))]
    if len(points) > 1:
        parts += [Text(text) for text in curve(points, key.replace("_", " "), width)]
    else:
        parts.append(Text(translated(f"no curve of {key.replace('_', ' ')} yet"), "dim"))
    if rows:
        parts.append(Text(visible(cut(line(rows[-1]), width))))
    for asked, answer in last_samples(record):
        parts.append(Text(cut(asked, width), "dim"))
        if answer is not None:
            parts.append(Text(cut(f"  {answer}", width)))
    if record.error:
        parts.append(Text(visible(cut(translated(str(record.error.get("error"))), width)), "red"))
    return Group(*parts)


def last_samples(record: Record) -> list[tuple[str, str | None]]:
    """[(what was asked, the answer)]: the last that were written while it trained, else those that `ft eval` kept, else
    a line on how there would be some."""
    written = read_lines(record.run.samples)
    last = [row for row in written if row.get("step") == written[-1].get("step")][-SAMPLES:]
    if last:
        return [(f"{at_step(row.get('step'))}  {one_line(row.get('prompt'))}", scored(row)) for row in last]
    kept = [row for one in record.evaluation.get("sets", []) for row in one.get("rows", [])][:SAMPLES]
    if kept:
        return [
            (f"ft eval, {at_row(row.get('row'))}  {one_line(row.get('asked'))}", one_line(row.get("tuned")))
            for row in kept
        ]
    if record.stage in ("pretrain", "reward"):
        return [(translated(f"ft {record.stage} writes no answers"), None)]
    during = (record.recipe.get("eval") or {}).get("during")
    if record.status == "done":
        return [(translated("no samples: ft eval of the run keeps some"), None)]
    some = during or record.stage == "ppo"
    return [(translated("no samples yet" if some else "no samples: eval.during answers some rows"), None)]


def at_step(step: Any) -> str:
    return translated(f"step {step}")


def at_row(row: Any) -> str:
    return translated(f"row {row}")


def scored(row: dict[str, Any]) -> str:
    score = f"  ({shown(row['score'])})" if records.is_number(row.get("score")) else ""
    return f"{one_line(row.get('reply'))}{score}"


def one_line(text: Any) -> str:
    return visible(" ".join(str(text).split()))


def cut(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def curve(points: Sequence[tuple[float, float]], title: str, width: int) -> list[str]:
    """A curve in Braille dots with its axes, `width` columns wide; stars where the terminal has no such characters."""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = max(len(shown(low)), len(shown(high))) + 1
    columns, dots = max(10, width - margin - 1), [[0] * max(10, width - margin - 1) for _ in range(ROWS_HIGH)]
    first, last = points[0][0], points[-1][0]
    spots = [
        (
            round((step - first) / max(last - first, 1e-12) * (columns * 2 - 1)),
            round((high - value) / max(high - low, 1e-12) * (ROWS_HIGH * 4 - 1)),
        )
        for step, value in points
    ]
    for (x, y), (right, to) in zip(spots, spots[1:] or spots, strict=False):
        before = y
        for here in range(x, right + 1):  # a straight line, of which steep parts do not fall apart
            height = round(y + (to - y) * (here - x) / (right - x)) if right > x else to
            for one in range(min(before, height), max(before, height) + 1):
                dots[one // 4][here // 2] |= DOTS[one % 4][here % 2]
            before = height
    plain = not encodable("\u28ff")
    marks = [["*" if bits else " " for bits in row] if plain else [chr(0x2800 + bits) for bits in row] for row in dots]
    labels = [shown(high), *[""] * (ROWS_HIGH - 2), shown(low)]
    body = [
        f"{label:>{margin - 1}} {'|' if plain else '│'}{''.join(row)}" for label, row in zip(labels, marks, strict=True)
    ]
    ends = f"{first:g}", at_step(f"{last:g}")
    foot = " " * (margin + 1) + ends[0] + " " * max(1, columns - sum(map(cell_len, ends))) + ends[1]
    return [title, *body, foot]
