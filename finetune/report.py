"""loss.png and report.html of a run, drawn from metrics.jsonl and result.json."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from finetune.run import Run

# What is drawn when a run logged it: (axis, [(key of metrics.jsonl, label, line style)]).
PANELS: tuple[tuple[str, list[tuple[str, str, str]]], ...] = (
    ("loss", [("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")]),
    (
        "reward",
        [("reward_mean", "score of the replies", "-"), ("rewards/chosen", "chosen", "-"),
         ("rewards/rejected", "rejected", "-"), ("mean_reward", "mean score", "-")],
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


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Everything of PANELS that was logged, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        return [x for x, _ in points], [y for _, y in points]

    drawn = [(axis, [line for line in lines if series(line[0])[0]]) for axis, lines in PANELS]
    drawn = [(axis, lines) for axis, lines in drawn if lines] or [PANELS[0]]
    heights = [2.0, *[1.0] * (len(drawn) - 1)]
    figure, axes = pyplot.subplots(
        len(drawn), 1, figsize=(8, 2 * sum(heights)), sharex=True, height_ratios=heights, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for (axis, lines), panel in zip(drawn, axes[:, 0], strict=True):
        for key, label, style in lines:
            panel.plot(*series(key), style, label=label, linewidth=1.5, markersize=4)
        panel.set_ylabel(axis)
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1 or (panel.lines and lines[0][1] != axis):
            panel.legend(frameon=False)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write(run: Run, result: dict[str, Any]) -> None:
    """loss.png and a self-contained report.html."""
    rows = run.read_metrics()
    image = run.path / "loss.png"
    plot(rows, image)
    picture = base64.b64encode(image.read_bytes()).decode()
    recipe = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    scalars = {k: v for k, v in result.items() if not isinstance(v, dict | list)}
    summary = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(_show(v))}</td></tr>" for k, v in scalars.items())
    decisions = "".join(f"<li>{html.escape(str(d))}</li>" for d in result.get("decisions", []))
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(run.path.name)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse}}th{{text-align:left;font-weight:500;padding:.1rem 1.5rem .1rem 0;color:#555}}
td{{font-variant-numeric:tabular-nums}}pre{{background:#f6f6f6;padding:1rem;overflow:auto}}img{{max-width:100%}}</style>
<h1>{html.escape(run.path.name)}</h1>
<table>{summary}</table>
{f"<h2>Decisions</h2><ul>{decisions}</ul>" if decisions else ""}
<img alt="loss over steps" src="data:image/png;base64,{picture}">
<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>
<h2>Result</h2><pre>{html.escape(json.dumps(result, ensure_ascii=False, indent=2))}</pre>
</html>
"""
    (run.path / "report.html").write_text(page, encoding="utf-8")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
