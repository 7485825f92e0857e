"""`ft runs`: what was trained below a folder (list), one run (show), two of them (diff), one that goes on (watch)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from finetune.errors import UserError, visible
from finetune.language import translated
from finetune.recipe.stages import RECIPES
from finetune.run import json_option, records
from finetune.run.differences import differences, from_defaults, result_values
from finetune.run.records import Record
from finetune.run.writing import strict
from finetune.terminal.progress import (
    advise,
    command,
    duration,
    note,
    row,
    say,
    shown_name,
    shown_path,
)
from finetune.terminal.progress import show as show_table
from finetune.terminal.values import in_cell, with_interval

SORTS: dict[str, Callable[[Record], Any]] = {
    "name": lambda r: str(r.path), "stage": lambda r: r.stage, "base": lambda r: r.base, "method": lambda r: r.method,
    "metric": lambda r: (records.headline(r) or ("", 0.0))[:2], "time": lambda r: r.seconds or 0.0,
    "status": lambda r: records.STATUSES.index(r.status) if r.status in records.STATUSES else -1,
    "updated": lambda r: r.updated,
}  # fmt: skip


def found(name: str) -> Record:
    """The run of an argument. UserError when there is none, with the nearest."""
    return records.read(Path(name).expanduser())


def show_list(
    folder: str, *, stage: str | None = None, base: str | None = None, method: str | None = None,
    status: str | None = None, sort: str = "name", reverse: bool = False, json_file: str | None = None,
) -> None:  # fmt: skip
    """A table of the runs below a folder, or the same as JSON."""
    one_of("--sort", sort, tuple(SORTS))
    if stage is not None:
        one_of("--stage", stage, tuple(RECIPES))
    if status is not None:
        one_of("--status", status, records.STATUSES)
    json_option.check(json_file, "runs")
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError("no such folder", path=folder, fix="name a folder that holds runs")
    if not os.access(place, os.R_OK | os.X_OK):
        raise UserError("cannot be read: Permission denied", path=folder, fix="check the folder's permissions")
    everything = list(records.below(place))
    kept = [
        r for r in everything
        if (stage or r.stage) == r.stage and (method or r.method) == r.method and (status or r.status) == r.status
        and (base or "").lower() in r.base.lower()
    ]  # fmt: skip
    kept.sort(key=SORTS[sort], reverse=reverse)
    json_option.write(json_file, {"runs": [as_json(record, place) for record in kept]})
    if json_file is None:
        if kept:
            show_table(table_of(kept, place))
        hidden = len(everything) - len(kept)
        if not kept:
            note(
                f"no run {'of these' if hidden else 'is'} below {folder}" + (f", {hidden} others are" if hidden else "")
            )
        elif hidden:
            note(f"{hidden} others are left out")


def table_of(kept: Sequence[Record], place: Path) -> Table:
    table = Table(title_justify="left")
    for heading in ("run", "stage", "base", "method", "figure", "time", "status"):
        table.add_column(translated(heading), justify="right" if heading == "time" else "left", overflow="fold")
    for record in kept:
        seconds = record.seconds
        row(
            table, name_in(record, place), record.stage, shown_name(record.base), record.method,
            figure(record), "" if seconds is None else duration(seconds), status_of(record),
        )  # fmt: skip
    return table


def name_in(record: Record, place: Path) -> str:
    inside = record.path.relative_to(place)
    return str(inside) if inside.parts else record.name


def figure(record: Record) -> str:
    head = records.headline(record)
    return "" if head is None else f"{head[0].replace('_', ' ')} {with_interval(*head[1:])}"


def status_of(record: Record) -> str:
    """`done`, or how far it got."""
    status = translated(record.status)
    return status if record.status == "done" else f"{status} {translated(f'at step {record.steps}')}"


def as_json(record: Record, place: Path | None = None) -> dict[str, Any]:
    head = records.headline(record)
    metric = None if head is None else {"name": head[0], "value": head[1], "ci": head[2]}
    values = {
        "name": record.name if place is None else name_in(record, place), "path": str(record.path.resolve()),
        "stage": record.stage, "base": record.base, "method": record.method, "metric": metric,
        "seconds": record.seconds, "steps": record.steps, "status": record.status, "updated": record.updated,
    }  # fmt: skip
    found: dict[str, Any] = strict(values)
    return found


def show(name: str, json_file: str | None = None) -> None:
    """One run: how far it is, what it was trained with that is not the default, what came out."""
    record = found(name)
    json_option.check(json_file, "recipe")
    if json_file is not None:
        values = {**as_json(record), "error": record.error.get("error"), "recipe": record.recipe}
        json_option.write(
            json_file, {**values, "result": record.result, "evaluation": record.evaluation.get("sets", [])}
        )
        return
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.updated))
    say(f"{shown_path(record.path)}: ft {record.stage}, {status_of(record)}, {when}")
    if record.error:
        say(f"  {translated(str(record.error.get('error')))}")
    for title, values in (("result", figures_of(record)), ("recipe, where it is not the default", changed_of(record))):
        if values:
            say(f"{translated(title)}:")
            width = max(map(len, values))
            for key, value in values.items():
                say(f"  {key:<{width}}  {value}")
    for decision in record.result.get("decisions") or ():
        say(f"{translated('decided')}: {translated(str(decision))}")
    if record.status in ("interrupted", "failed") and record.run.last_checkpoint() is not None:
        recipe = shown_path(record.path / "recipe.yaml")
        advise(f"go on with {command(record.stage, '--recipe', recipe, '--resume')}")


def figures_of(record: Record) -> dict[str, str]:
    return {key: in_cell(value) for key, value in result_values(record).items() if key != "status"}


def changed_of(record: Record) -> dict[str, str]:
    values = from_defaults(record.recipe)
    return {key: in_cell(value) for key, (value, _, other) in values.items() if other and key != "output.dir"}


def diff(first: str, second: str, json_file: str | None = None) -> None:
    """What differs between two runs in recipe, data, versions and result."""
    pair = [found(first), found(second)]
    json_option.check(json_file, "differences")
    parts = differences(pair)
    if json_file is not None:
        json_option.write(json_file, {"runs": [str(one.path.resolve()) for one in pair], "differences": parts})
        return
    names = [shown_path(one.path) for one in pair]
    for part, values in parts.items():
        if not values:
            say(f"{translated(part)}: {translated('no difference')}")
            continue
        table = Table(title=f"{translated(part)}:", title_justify="left")
        for heading in ("", *names):
            table.add_column(visible(heading), overflow="fold")
        for key, each in values.items():
            row(table, key, *(in_cell(v[:12] if key.startswith("content of") and v else v) for v in each))
        show_table(table)


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{value!r} is not possible here", key=option, fix=f"one of {', '.join(known)}")
