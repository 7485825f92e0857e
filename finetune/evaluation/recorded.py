"""evaluation.json in a run directory: what `ft eval` last found of the run, for its report and `ft runs`.

    {command: eval, sets: [{name, data, n, kind, before (of the base, or null), after, comparisons, changed, rows}]}

`rows` are side by side, those that changed first, up to a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.comparisons import in_both
from finetune.evaluation.generation import Evaluation
from finetune.evaluation.report import Found, content, option
from finetune.evaluation.targets import Target
from finetune.metrics import Metric
from finetune.run.directory import Run, versions
from finetune.run.records import is_run
from finetune.run.writing import write_json
from finetune.terminal.progress import note, shown_path

MOST = 60
"""Rows that are kept of a set."""
LONGEST = 1500
"""Characters of a text that are kept, half of them from each end."""


def keep(references: Sequence[str], tuned: Sequence[Target], targets: Sequence[Target], sets: Sequence[Found]) -> None:
    """Written into the directory of each run that was evaluated; where nothing can be written, that is said.

    references: what each of `tuned` was named by. targets: all that were measured, bases included.
    """
    for reference, target in zip(references, tuned, strict=True):
        folder = Path(reference).expanduser()
        if not target.trained or not is_run(folder):
            continue
        base = next((one for one in targets if not one.trained and one.model == target.base), None)
        found = [as_recorded(one, target.name, None if base is None else base.name) for one in sets]
        try:
            write_json(Run(folder).evaluation, {"command": "eval", "sets": found, "versions": versions()})
        except OSError as error:  # the figures are on the screen
            note(f"not kept for the report of {shown_path(folder)}: {error.strerror}")


def as_recorded(one: Found, name: str, base: str | None) -> dict[str, Any]:
    after = next(result for result in one.results if result.name == name)
    before = next((result for result in one.results if result.name == base), None)
    metric = next((m for m in one.chosen if m.against is None and any(m.of(r) is not None for r in after.rows)), None)
    rows = side_by_side(before, after, metric)
    return {
        "name": one.name, "data": one.data, "general": one.general, "n": after.n, "kind": after.kind,
        "generation": after.generation, "before": None if before is None else before.metrics, "after": after.metrics,
        "comparisons": [c for c in one.comparisons if before is not None and (c["a"], c["b"]) == (base, name)],
        "by": None if metric is None else metric.name,
        "changed": sum(bool(row["change"]) for row in rows), "rows": rows[:MOST],
    }  # fmt: skip


def side_by_side(before: Evaluation | None, after: Evaluation, metric: Metric | None) -> list[dict[str, Any]]:
    """All rows: first those that became worse, then better, then those that are wrong now."""
    pairs = [(None, row) for row in after.rows] if before is None else in_both(before, after)
    found: list[dict[str, Any]] = []
    for was, row in pairs:
        old, new = (None if side is None or metric is None else metric.of(side) for side in (was, row))
        sign = -1 if metric is not None and metric.lower_is_better else 1
        gain = 0.0 if old is None or new is None else sign * (float(new) - float(old))
        found.append(
            {
                "row": row.get("row"),
                **texts(row, after.kind),
                "value": new,
                "base_value": old,
                "base": None if was is None else said(was, after.kind),
                "tuned": said(row, after.kind),
                "change": "worse" if gain < 0 else "better" if gain > 0 else "",
                "order": (gain if gain < 0 else 1 / (1 + gain) if gain > 0 else 2.0, sign * float(new or 0.0)),
            }
        )
    found.sort(key=lambda one: one["order"])
    return [{key: value for key, value in one.items() if key != "order"} for one in found]


def texts(row: dict[str, Any], kind: str) -> dict[str, str]:
    """What was asked, and what would be right."""
    asked = str(row["messages"][-1]["content"]) if row.get("messages") else ""
    right = row.get("reference")
    if kind == "choices":
        right = option(row["options"], row["reference"])
    elif kind == "pairs":
        right = content(row["chosen"])
    elif kind == "unpaired":
        right = f"{'good' if row['label'] else 'bad'}: {content(row['completion'])}"
    elif kind == "text":
        right = row["text"]
    return {"asked": shortened(asked), "reference": "" if right is None else shortened(str(right))}


def said(row: dict[str, Any], kind: str) -> str:
    """What the model did with a row."""
    if kind == "choices":
        return option(row["options"], row["prediction"])
    if kind == "answers" and row.get("prediction") is not None:
        return shortened(str(row["prediction"]))
    if row.get("margin") is not None:
        return f"margin {row['margin']:+.3f}"
    return "" if row.get("loss") is None else f"loss {row['loss']:.3f}"


def shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"
