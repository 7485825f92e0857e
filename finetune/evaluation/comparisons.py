"""Two models on the same rows: differences with their intervals, what was forgotten, and the rows that changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from finetune import metrics
from finetune.errors import visible
from finetune.evaluation.generation import Evaluation
from finetune.language import translated
from finetune.metrics import Metric, paired
from finetune.terminal.progress import row as add_row
from finetune.terminal.progress import show as show_table
from finetune.terminal.progress import tell

Row = dict[str, Any]


def compare(a: Evaluation, b: Evaluation, metric: Metric, group: str | None = None) -> dict[str, Any]:
    """b against a on the rows, or those of a group, that both have."""
    about = {"a": a.name, "b": b.name, "metric": metric.named(group)}
    if metric.against is not None:
        both = in_both(a, b)
        return {**about, **metric.against([x for x, _ in both], [y for _, y in both])}
    both = [(x, y) for x, y in in_both(a, b, group) if metric.of(x) is not None and metric.of(y) is not None]
    sides = [[pair[side] for pair in both] for side in (0, 1)]
    values = [[float(value) for row in side if (value := metric.of(row)) is not None] for side in sides]
    weights = [[metric.weight(row) for row in side] for side in sides]
    alike = len({weight for side in weights for weight in side}) < 2
    counts = None if alike else (weights[0], weights[1])
    return {**about, **paired(values[0], values[1], metric.lower_is_better, weights=counts)}


def in_both(a: Evaluation, b: Evaluation, group: str | None = None) -> list[tuple[Row, Row]]:
    """The rows, or those of a group, that both have measured."""
    after = {row.get("place", i): row for i, row in enumerate(b.rows)}
    return [
        (row, after[place])
        for i, row in enumerate(a.rows)
        if (place := row.get("place", i)) in after and (group is None or row.get("group") == group)
    ]


def comparable(results: Sequence[Evaluation], chosen: Sequence[Metric]) -> list[tuple[Metric, str | None]]:
    """(metric, group of rows or None for all) in which these models can be compared; none where they read other
    tokens."""
    if results[0].kind == "text" and len({tuple(row["tokens"] for row in result.rows) for result in results}) > 1:
        return []
    return metrics.compared(results[0].kind, [result.metrics for result in results], chosen)


# --- what was forgotten ---


FEWEST = 6  # rows: of five all are worse by chance once in 32 times, and drawing from them shows nothing else


def forgotten(found: Sequence[dict[str, Any]], chosen: Sequence[Metric]) -> list[dict[str, Any]]:
    """The comparisons, of FEWEST rows or more, in which b is worse than a by more than the interval."""
    lower = {metric.name for metric in chosen if metric.lower_is_better}
    known = [one for one in found if one["n"] >= FEWEST]
    return [one for one in known if (one["ci"][0] > 0 if one["metric"] in lower else one["ci"][1] < 0)]


# --- what changed ---


SHOWN = ("file", "row", "messages", "reference", "chosen", "text")


def changes(a: Evaluation, b: Evaluation, metric: Metric, most: int) -> dict[str, Any]:
    """{a, b, metric, n, worse, better, rows}: how many of the n rows b has worse and better than a, and up to `most` of
    each, the worse ones first; by how much, where a row is not only right or wrong."""
    sign, known = (-1 if metric.lower_is_better else 1), []
    for before, after in in_both(a, b):
        x, y = metric.of(before), metric.of(after)
        if x is not None and y is not None:
            known.append((sign * (y - x), x, y, before, after))
    halves = [sorted((one for one in known if one[0] * side > 0), key=lambda one: -abs(one[0])) for side in (-1, 1)]
    rows = [
        {
            "change": name, **{key: before[key] for key in SHOWN if key in before},
            "a": {"value": x, **what_it_did(before, a.kind)}, "b": {"value": y, **what_it_did(after, b.kind)},
        }
        for name, half in zip(("worse", "better"), halves, strict=True)
        for _, x, y, before, after in half[:most]
    ]  # fmt: skip
    counts = {"n": len(known), "worse": len(halves[0]), "better": len(halves[1])}
    return {"a": a.name, "b": b.name, "metric": metric.name, **counts, "rows": rows}


def what_it_did(row: Row, kind: str) -> dict[str, Any]:
    """What of a row is the model's own."""
    names = {"answers": ("prediction", "loss"), "choices": ("prediction",), "pairs": ("margin", "loss")}
    return {name: row[name] for name in names.get(kind, ("loss",)) if row.get(name) is not None}


def show_changes(found: dict[str, Any], label: str, binary: bool) -> None:
    """Side by side, to stdout. binary: a row is right or wrong."""
    a, b, n = found["a"], found["b"], found["n"]
    for change in ("worse", "better"):
        rows = [one for one in found["rows"] if one["change"] == change]
        right, wrong = (a, b) if change == "worse" else (b, a)
        how = f"right with {right}, wrong with {wrong}" if binary else f"{change} with {b} than with {a}"
        title = f"{how} ({label}): {found[change]} of {n} rows"
        tell(title + (f", {len(rows)} of them" if rows and len(rows) < found[change] else ""))
        if not rows:
            continue
        table = Table(show_lines=True)
        for heading in (*map(translated, ("row", "asked", "reference")), a, b):
            table.add_column(visible(heading), overflow="fold")
        for one in rows:
            add_row(
                table, str(one["row"]), asked(one), reference(one), *(did(one[side], binary) for side in ("a", "b"))
            )
        show_table(table)


LONGEST = 240  # characters of a cell


def clipped(text: str) -> str:
    """Both ends of a long text."""
    text = text.replace("\n", "⏎").replace("\t", " ")
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def asked(one: Row) -> str:
    turns = one.get("messages")
    return clipped(str(turns[-1]["content"])) if turns else ""


def reference(one: Row) -> str:
    if "chosen" in one:
        return clipped(" ".join(str(turn["content"]) for turn in one["chosen"]))
    return clipped(str(one.get("reference") or one.get("text") or ""))


def did(side: Row, binary: bool) -> str:
    text = clipped(str(side["prediction"])) if "prediction" in side else ""
    if "margin" in side:
        text = f"margin {side['margin']:+.3f}"
    return text if binary else f"{text} ({side['value']:.3f})".strip()
