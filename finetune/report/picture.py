"""loss.png of a run, drawn from metrics.jsonl."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from finetune.report.curves import LOG_FROM, PANELS, answered
from finetune.run.directory import Run
from finetune.run.writing import write_atomically


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
    plot(run.read_metrics(), run.path / "loss.png", f"{run.path.name}: ft {result['stage']}, {result['steps']:,} steps")
