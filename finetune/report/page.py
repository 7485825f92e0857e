"""report.html: one file that holds all it needs, for one run or several, and the index of a folder of runs.

The templates are in assets/; they escape whatever they are given. The page may fetch nothing, and of scripts it runs
those whose digest its first lines name.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune.errors import visible
from finetune.language.agreeing import agreed
from finetune.report.gather import POINTS, run_view
from finetune.run import records
from finetune.run.differences import differences, told
from finetune.run.records import Record
from finetune.run.writing import write_atomically
from finetune.terminal.progress import duration, shown_name
from finetune.terminal.values import in_cell, with_interval

ASSETS = Path(__file__).parent / "assets"
MARK = '<meta name="generator" content="ft report">'
SCRIPTS = ("uPlot.iife.min.js", "report.js")
STYLES = ("uPlot.min.css", "report.css")
FEWEST = 60
"""Points of a line, however many runs share a page."""


@cache
def templates() -> Environment:
    def safe(value: Any) -> Any:
        """Control characters and reordering ones are shown, not obeyed."""
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    found = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined, finalize=safe, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters["agreed"] = agreed
    found.filters["breaking"] = breaking
    found.globals["generator"] = Markup(MARK)
    found.globals["styles"] = Markup("\n".join(asset(name) for name in STYLES))
    found.globals["scripts"] = [Markup(asset(name)) for name in SCRIPTS]
    found.globals["digests"] = " ".join(f"'sha256-{digest(asset(name))}'" for name in SCRIPTS)
    found.globals["licence"] = " ".join(asset("uPlot-LICENSE").split())
    return found


def breaking(name: str) -> Markup:
    """A key, which may be broken into lines behind its dots and underscores."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(visible(name)))))


@cache
def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8").strip()


def digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def write(path: Path, result: dict[str, Any] | None = None) -> Path:
    """report.html of a run, in its directory.

    result: what result.json will hold, for a run that is about to be finished.
    """
    record = records.read(path)
    record = record if result is None else Record(path, record.recipe, result)
    target = path / "report.html"
    write_atomically(target, of_one(record))
    return target


def of_one(record: Record) -> str:
    view = run_view(record)
    image = record.path / "loss.png"
    picture = base64.b64encode(image.read_bytes()).decode() if image.is_file() and not image.is_symlink() else ""
    curves = charts([view])
    return templates().get_template("run.html.j2").render(run=view, curves=curves, picture=picture, title=view["name"])


def of_several(found: Sequence[Record]) -> str:
    """The curves of several runs in one another, their figures beside each other."""
    views = [run_view(record, max(FEWEST, POINTS // len(found))) for record in found]
    for view, name in zip(views, names_of(found), strict=True):
        view["name"] = name
    parts = {
        part: [(key, [in_cell(told(key, value)) for value in values]) for key, values in table.items()]
        for part, table in differences(found).items()
    }
    title = ", ".join(view["name"] for view in views[:3]) + ("…" if len(views) > 3 else "")
    page = templates().get_template("several.html.j2")
    return page.render(runs=views, curves=charts(views), parts_of=parts, figures=figures(views), title=title)


def names_of(found: Sequence[Record]) -> list[str]:
    """Of each run its name, with its parent's where two are alike."""
    names = [record.name for record in found]
    return [
        name if names.count(name) == 1 else "/".join(record.path.resolve().parts[-2:])
        for name, record in zip(names, found, strict=True)
    ]


def figures(views: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the table of figures: name, value of each run."""
    each: list[dict[str, str]] = []
    for view in views:
        values = dict(view["figures"])
        for one in view["held_out"]:
            for metric, _, after, _ in one["rows"]:
                values[f"{one['name']} {metric}".strip() if one["by"] == "ft eval" else f"held-out {metric}"] = after
        each.append(values)
    names = dict.fromkeys(name for values in each for name in values)
    return [(name, [values.get(name, "") for values in each]) for name in names]


def charts(views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels of all runs, those of one title in one; each line says whose it is."""
    found: dict[str, dict[str, Any]] = {}
    for number, view in enumerate(views):
        for panel in view["panels"]:
            there = found.setdefault(panel["title"], {"title": panel["title"], "more": panel["more"], "lines": []})
            there["lines"] += [{**line, "run": number, "of": view["name"]} for line in panel["lines"]]
    return list(found.values())


def index(folder: Path, found: Sequence[Record], place: Path | None = None) -> str:
    """A table of the runs below a folder, with links to their reports from `place`, the folder itself if unset."""
    rows = []
    for record in found:
        head, inside = records.headline(record), record.path.relative_to(folder)
        report = record.path / "report.html"
        rows.append(
            {
                "name": str(inside) if inside.parts else record.name,
                "link": quote(os.path.relpath(report.resolve(), (place or folder).resolve()))
                if report.is_file()
                else "",
                "stage": record.stage,
                "base": shown_name(record.base),
                "method": record.method,
                "metric": "" if head is None else head[0].replace("_", " "),
                "value": "" if head is None else with_interval(*head[1:]),
                "number": "" if head is None else head[1],
                "time": "" if record.seconds is None else duration(record.seconds),
                "seconds": record.seconds or 0,
                "status": record.status,
                "steps": record.steps,
                "updated": record.updated,
                "spark": spark(record),
            }
        )
    name = folder.resolve().name
    return templates().get_template("index.html.j2").render(rows=rows, title=f"runs in {name}/", curves=[])


def spark(record: Record) -> str:
    """The points of a small curve of the training loss, for a box of 100 by 24; "" without one."""
    key = "reward_mean" if any("reward_mean" in row for row in record.metrics) else "loss"
    points = [(row["step"], row[key]) for row in record.metrics if records.is_number(row.get(key))]
    if len(points) < 2:
        return ""
    points = points[:: max(1, len(points) // 60)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    width, height = max(points[-1][0] - points[0][0], 1e-12), max(high - low, 1e-12)
    return " ".join(f"{100 * (x - points[0][0]) / width:.1f},{22 - 20 * (y - low) / height:.1f}" for x, y in points)


def is_report(path: Path) -> bool:
    """Whether a file is a page of ours."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(600)
