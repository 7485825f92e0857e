"""loss.png and report.html of a run, drawn from metrics.jsonl and result.json."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from finetune.metrics import METRICS
from finetune.run.directory import Run
from finetune.run.writing import write_atomically

# What is drawn when a run logged it: (axis, [(key of metrics.jsonl, label, line style)]).
PANELS: tuple[tuple[str, list[tuple[str, str, str]]], ...] = (
    ("loss", [("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")]),
    (
        "reward",
        [("reward_mean", "score of the replies", "-"), ("rewards/chosen", "chosen", "-"),
         ("rewards/rejected", "rejected", "-"), ("mean_reward", "mean score", "-"),
         ("eval_reward_mean", "score of held-out replies", "o-")],
    ),
    (
        "margin",
        [("rewards/margins", "training margin", "-"), ("eval_rewards/margins", "held-out margin", "o-"),
         ("margin", "training margin", "-"), ("eval_margin", "held-out margin", "o-")],
    ),
    (
        "accuracy",
        [("rewards/accuracies", "training pairs", "-"), ("eval_rewards/accuracies", "held-out pairs", "o-"),
         ("accuracy", "training pairs", "-"), ("eval_accuracy", "held-out pairs", "o-")],
    ),
    ("KL, nats per reply", [("kl", "KL to the reference", "-")]),
    ("share", [("eos_rate", "replies that end", "-"), ("clip_fraction", "clipped tokens", "-")]),
    ("learning rate", [("learning_rate", "learning rate", "-")]),
    ("gradient norm", [("grad_norm", "gradient norm", "-")]),
)  # fmt: skip


def answered(rows: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Panels of the metrics of held-out answers: shares in one, anything else in one of its own."""
    others = {key for _, lines in PANELS for key, _, _ in lines}
    names = {metric.name for metric in METRICS if metric.needs == "prediction"}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("eval_")]
    found: dict[str, list[tuple[str, str, str]]] = {}
    for key in keys:
        name = key.removeprefix("eval_")
        if key in others or key.endswith("_ci") or not (name in names or ":" in name):
            continue
        values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
        share = all(0 <= value <= 1 for value in values)
        label = name if ":" in name else name.replace("_", " ")
        found.setdefault("held-out answers" if share else label, []).append((key, label, "o-"))
    return [*found.items()]


LOG_FROM = 20.0  # a loss that falls by more than this shows nothing of its end on a linear axis


def plot(rows: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Everything of PANELS that was logged, over steps; with intervals where a row has KEY_ci beside KEY."""
    import matplotlib

    rows = sorted(rows, key=lambda row: row["step"])  # the best checkpoint's may come last
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        return [x for x, _ in points], [y for _, y in points]

    panels = (PANELS[0], *answered(rows), *PANELS[1:])
    drawn = [(axis, [line for line in lines if series(line[0])[0]]) for axis, lines in panels]
    drawn = [(axis, lines) for axis, lines in drawn if lines] or [PANELS[0]]
    heights = [2.0, *[1.0] * (len(drawn) - 1)]
    figure, axes = pyplot.subplots(
        len(drawn), 1, figsize=(8, 2 * sum(heights)), sharex=True, height_ratios=heights, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for (axis, lines), panel in zip(drawn, axes[:, 0], strict=True):
        for key, label, style in lines:
            (line,) = panel.plot(*series(key), style, label=label, linewidth=1.5, markersize=4)
            known = [row for row in rows if isinstance(row.get(key), int | float) and row.get(f"{key}_ci")]
            if known:
                low, high = zip(*(row[f"{key}_ci"] for row in known), strict=True)
                panel.vlines([row["step"] for row in known], low, high, color=line.get_color(), linewidth=1)
        values = [value for key, _, _ in lines for value in series(key)[1]]
        if axis == "loss" and values and min(values) > 0 and max(values) > LOG_FROM * min(values):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        panel.set_ylabel(axis)
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1 or (panel.lines and lines[0][1] != axis):
            panel.legend(frameon=False)
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[-1, 0].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    figure.align_ylabels()
    axes[0, 0].set_title(title, loc="left", fontsize="medium", parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=100)
    write_atomically(path, image.getvalue())
    pyplot.close(figure)


def write(run: Run, result: dict[str, Any]) -> None:
    """loss.png and a self-contained report.html."""
    rows = run.read_metrics()
    image = run.path / "loss.png"
    plot(rows, image, f"{run.path.name}: ft {result['stage']}, {result['steps']:,} steps")
    picture = base64.b64encode(image.read_bytes()).decode()
    recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    summary = _table({k: v for k, v in result.items() if v is not None and not isinstance(v, dict | list)})
    held_out = _table(with_intervals(result.get("eval") or {}))
    decisions = "".join(f"<li>{html.escape(str(d))}</li>" for d in result.get("decisions", []))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(run.path.name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse}}th{{text-align:left;font-weight:500;padding:.1rem 1.5rem .1rem 0;color:#555}}
td{{font-variant-numeric:tabular-nums}}pre{{background:#f6f6f6;padding:1rem;overflow:auto}}img{{max-width:100%}}</style>
<h1>{html.escape(run.path.name)}</h1>
{summary}
{f"<h2>Held-out</h2>{held_out}" if held_out else ""}
{f"<h2>Decisions</h2><ul>{decisions}</ul>" if decisions else ""}
<img alt="loss over steps" src="data:image/png;base64,{picture}">
<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>
<h2>Result</h2><pre>{html.escape(json.dumps(result, ensure_ascii=False, indent=2))}</pre>
</html>
"""
    write_atomically(run.path / "report.html", page)


def with_intervals(metrics: dict[str, Any]) -> dict[str, str]:
    """Metric -> `0.933 [0.882, 0.963]`, each with its interval where it has one."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            interval = metrics.get(f"{name}_ci")
            found[name] = shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")
    return found


def _table(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k.replace('_', ' '))}</th><td>{html.escape(shown(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{rows}</table>" if rows else ""


def shown(value: Any) -> str:
    """A number for people: four digits, large ones with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
