"""What a report says of a run, as plain values for the templates: nothing here is HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune.language.agreeing import agreed
from finetune.report.curves import panels
from finetune.run import records
from finetune.run.differences import from_defaults
from finetune.run.records import Record, flat, is_number
from finetune.terminal.progress import duration, shown_name
from finetune.terminal.values import in_cell, shown, with_interval

POINTS = 2000
"""Of a line in the report of one run."""
LONGEST = 1500
SAMPLES = 40
UNSAID = (
    "n", "num_tokens", "reward_before", "reward_mean", "reward_difference", "trained_on", "weights_gb",
    "tokens_per_second",
)  # fmt: skip
"""Of the held-out figures: counts, what is of the machine, and what has a row of its own."""
LINES = 12
"""Of a text that are shown."""


def run_view(record: Record, points: int = POINTS) -> dict[str, Any]:
    result = record.result
    seconds, audit = record.seconds, record.data_audit
    return {
        "name": record.name, "stage": record.stage, "base": shown_name(record.base), "method": record.method,
        "status": record.status, "steps": record.steps, "written": when(record.updated),
        "figures": key_figures(record), "warnings": warnings(record), "held_out": held_out(record),
        "samples": samples(record), "replies": replies(record), "masks": masks(audit), "audit": data_audit(record),
        "memory": memory(result), "recipe": recipe_rows(record), "environment": environment(result),
        "panels": panels(record.metrics, points), "seconds": seconds,
        "raw": json.dumps(brief(result), ensure_ascii=False, indent=2) if result else "",
    }  # fmt: skip


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds else ""


def key_figures(record: Record) -> list[tuple[str, str]]:
    """(name, value) of what stands on top."""
    result, found = record.result, []
    head = records.headline(record)
    if head is not None:
        name = "held-out " + head[0] if head[0] in record.held_out else head[0]
        found.append((name.replace("_", " "), with_interval(*head[1:])))
    if is_number(result.get("train_loss")) and (head is None or head[0] != "train_loss"):
        found.append(("training loss", shown(result["train_loss"])))
    if record.seconds is not None:
        found.append(("time", duration(record.seconds)))
    found.append(("steps", f"{record.steps:,}"))
    speeds = [row["tokens_per_second"] for row in record.metrics if is_number(row.get("tokens_per_second"))]
    if speeds:
        found.append(("tokens per second", shown(sorted(speeds)[len(speeds) // 2])))
    if is_number(peak := result.get("peak_memory_gb")):
        found.append(("peak memory", f"{shown(peak)} GB"))
    if trainable := result.get("trainable_parameters"):
        share = trainable / max(1, result.get("total_parameters") or 1)
        found.append(("trained parameters", f"{trainable:,} ({share:.2%})"))
    return found


def warnings(record: Record) -> list[str]:
    """What was decided or found, and what went wrong."""
    found = [] if not record.error else [f"failed: {record.error.get('error')}"]
    if record.status in ("interrupted", "failed", "running"):
        found.append(f"{record.status} at step {record.steps:,}: what follows is of an unfinished run")
    lost = [item for one in record.evaluation.get("sets", []) for item in one.get("comparisons", [])]
    decided = [agreed(str(line)) for line in record.result.get("decisions") or ()]
    return [*found, *decided, *filter(None, map(forgotten, lost))]


def forgotten(item: Mapping[str, Any]) -> str | None:
    """What is worse than before by more than the interval."""
    low, high = item["ci"]
    lower = "loss" in item["metric"] or "perplexity" in item["metric"]
    if not (low > 0 if lower else high < 0):
        return None
    return (
        f"{item['metric'].replace('_', ' ')} is worse than the base's: {with_interval(item['difference'], item['ci'])}"
    )


def held_out(record: Record) -> list[dict[str, Any]]:
    """[{name, n, rows: [(metric, before, after, difference)]}]: of `ft eval` where it was asked, else of the run."""
    found = []
    for one in record.evaluation.get("sets", []):
        before, after = one.get("before") or {}, one.get("after") or {}
        differences = {c["metric"]: with_interval(c["difference"], c["ci"]) for c in one.get("comparisons", [])}
        rows = [
            (name.replace("_", " "), figure(before, name), figure(after, name), differences.get(name, ""))
            for name in dict.fromkeys([*after, *before])
            if is_number(after.get(name, before.get(name))) and name not in UNSAID
        ]
        name, data = shown_name(str(one.get("name"))), shown_name(str(one.get("data")))
        title = f"{name if name == data else f'{name}: {data}'}, n = {one.get('n'):,}"
        found.append({"name": name, "title": title, "rows": rows, "by": "ft eval"})
    figures = record.result.get("eval")
    if isinstance(figures, dict) and figures and not found:
        rows = [
            (name.replace("_", " "), "", figure(figures, name), "")
            for name in figures
            if is_number(figures[name]) and name not in UNSAID
        ]
        if "reward_before" in figures:
            difference = figure(figures, "reward_difference")
            rows.insert(0, ("reward", shown(figures["reward_before"]), shown(figures["reward_mean"]), difference))
        n = f", n = {figures['n']:,}" if is_number(figures.get("n")) else ""
        found.append({"name": "", "title": f"of the weights that were kept{n}", "rows": rows, "by": "training"})
    return found


def figure(values: Mapping[str, Any], name: str) -> str:
    return with_interval(values[name], values.get(f"{name}_ci")) if is_number(values.get(name)) else ""


def samples(record: Record) -> list[dict[str, Any]]:
    """[{title, base, rows}]: answers of base and tuned beside the reference, rows that changed first."""
    found = []
    for one in record.evaluation.get("sets", []):
        rows = [
            {key: clipped(value) if key in TEXTS and value is not None else value for key, value in row.items()}
            for row in one.get("rows", [])[:SAMPLES]
        ]
        if rows:
            shown_of = f"{len(rows)} of {one['n']:,} rows" if len(rows) < one["n"] else f"{len(rows)} rows"
            by = f", by {one['by'].replace('_', ' ')}" if one.get("by") else ""
            title = f"{shown_name(str(one['name']))}: {shown_of}{by}" + (
                f", {one['changed']} changed" if one.get("before") else ""
            )
            found.append({"title": agreed(title), "base": one.get("before") is not None, "rows": rows})
    return found


def replies(record: Record) -> list[dict[str, Any]]:
    """samples.jsonl: what was written while the run trained, the last steps first."""
    from finetune.run.writing import read_lines

    rows = read_lines(record.run.samples)[-SAMPLES:]
    return [
        {
            "step": row.get("step"), "prompt": clipped(row.get("prompt")), "reply": clipped(row.get("reply")),
            "score": shown(row["score"]) if is_number(row.get("score")) else "",
        }
        for row in reversed(rows)
    ]  # fmt: skip


TEXTS = ("asked", "reference", "base", "tuned")


def clipped(text: Any) -> str:
    """The first lines of a text, of a long one both ends."""
    lines = ("" if text is None else str(text)).split("\n")
    text = "\n".join(
        [*lines[:LINES], agreed(f"… {len(lines) - LINES} more lines")] if len(lines) > LINES + 1 else lines
    )
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


def masks(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {**one, "file": shown_name(str(one.get("file"))), "answer": one.get("answer") or ""}
        for one in audit.get("preview") or ()
    ]


def data_audit(record: Record) -> dict[str, Any]:
    """{counts, lengths, languages, problems}: tables of (name, number, share) and of problems."""
    audit = record.data_audit
    counts = audit.get("counts") or record.result.get("data") or {}
    numbers = {key.replace("_", " "): f"{value:,}" for key, value in counts.items() if is_number(value)}
    kinds = [(kind.replace("_", " "), f"{count:,}") for kind, count in (audit.get("kinds") or {}).items() if count]
    problems = [
        (one.get("level"), shown_name(str(one.get("file"))), one.get("row"), clipped(one.get("message")))
        for one in audit.get("problems") or ()
    ]
    return {
        "counts": list(numbers.items()), "lengths": shares(audit.get("tokens") or audit.get("characters")),
        "unit": "tokens" if audit.get("tokens") else "characters", "languages": shares(audit.get("languages")),
        "kinds": kinds, "problems": problems,
    }  # fmt: skip


def shares(counts: Mapping[str, Any] | None) -> list[tuple[str, str, float]]:
    """(name, count, percent of all)"""
    total = sum((counts or {}).values()) or 1
    return [(name, f"{count:,}", round(100 * count / total, 1)) for name, count in (counts or {}).items() if count]


def memory(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was planned, by part where it is known, and what was measured."""
    plan = result.get("plan")
    rows = []
    if isinstance(plan, dict):
        parts = plan["memory"] if isinstance(plan.get("memory"), dict) else {}
        rows += [
            (f"planned: {part.replace('_', ' ')}", f"{shown(gb)} GB") for part, gb in parts.items() if is_number(gb)
        ]
        if is_number(plan.get("peak_memory_gb")):
            passes = ""
            if is_number(plan.get("rows")) and is_number(plan.get("tokens")):
                passes = f", for passes of {plan['rows']:,} x {plan['tokens']:,} tokens"
            rows.append(("planned peak", f"{shown(plan['peak_memory_gb'])} GB{passes}"))
    if is_number(result.get("peak_memory_gb")):
        machine = result.get("machine")
        on_gpu = isinstance(machine, dict) and machine.get("device") == "cuda"
        of = "tensors on the GPU: without framework and fragmentation" if on_gpu else "of the whole process"
        rows.append(("measured peak", f"{shown(result['peak_memory_gb'])} GB, {of}"))
    return rows


def recipe_rows(record: Record) -> list[tuple[str, str, str, bool]]:
    """(key, value, default, whether it is another) of the resolved recipe."""
    rows: list[tuple[str, str, str, bool]] = []
    for key, (value, usual, other) in from_defaults(record.recipe).items():
        rows.append((key, in_recipe(value), "unset" if usual is None else in_recipe(usual), other))
    return sorted(rows, key=lambda row: not row[3])


def in_recipe(value: Any) -> str:
    """Paths by their last part: the rest is somebody's home."""
    return shown_name(value) if isinstance(value, str) else in_cell(value)


def environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    machine = result.get("machine")
    found = flat({**(machine if isinstance(machine, dict) else {}), **(result.get("versions") or {})})
    return [(key.replace("_", " "), str(value)) for key, value in found.items() if value is not None]


def brief(result: Mapping[str, Any]) -> dict[str, Any]:
    """result.json without its longest part: every tensor that was trained."""
    trained = result.get("trained")
    short: Callable[[Any], Any] = lambda v: f"{len(v):,} entries" if isinstance(v, dict) and len(v) > 8 else v  # noqa: E731
    if not isinstance(trained, dict):
        return dict(result)
    return {**result, "trained": {key: short(value) for key, value in trained.items()}}
