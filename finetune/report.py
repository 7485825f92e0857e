"""loss.png and report.html of a run, drawn from metrics.jsonl and result.json."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from finetune.run import Run


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss (training and held-out) above, learning rate and gradient norm below, over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return [x for x, _ in points], [y for _, y in points]

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")):
        x, y = series(key)
        if x:
            top.plot(x, y, style, label=label, linewidth=1.5, markersize=4)
    top.set_ylabel("loss (nats per token)")
    top.grid(alpha=0.3)
    if top.lines:
        top.legend(frameon=False)
    x, y = series("learning_rate")
    bottom.plot(x, y, color="tab:green", label="learning rate")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    x, y = series("grad_norm")
    if x:
        right = bottom.twinx()
        right.plot(x, y, color="tab:gray", linewidth=0.8)
        right.set_ylabel("gradient norm")
    figure.savefig(path, dpi=120)
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
