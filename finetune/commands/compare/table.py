"""How a comparison is shown: the table, the law of loss over data, the plot."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import metrics
from finetune.run.writing import write_atomically

# heading -> one result's cell; a base has no adapter, and rows without a reference no exact match.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "job": lambda r: r["name"],
    "trainable": lambda r: f"{r['trainable_parameters']:,}",
    "share": lambda r: f"{r['trainable_parameters'] / r['total_parameters']:.2%}",
    "stored": lambda r: f"{r['adapter_bytes'] / 1e6:.2f} MB",
    "peak memory": lambda r: f"{r['peak_memory_gb']:.2f} GB",
    "train tok/s": lambda r: f"{r['train_tokens_per_second']:,.0f}",
    "backward share": lambda r: f"{r['backward_share']:.0%}",
    "inference overhead": lambda r: f"{r['inference_overhead']:+.0%}",
    "mergeable": lambda r: r["mergeable"],
    "learning rate": lambda r: f"{r['learning_rate']:.3g}",
    "exact match [95%]": lambda r: with_interval(r["metrics"], "exact_match", 3),
    "loss [95%]": lambda r: with_interval(r["metrics"], "loss", 4),
}


def scaling_laws(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and quantization with three sizes or more: loss = E + B / rows^beta, and what doubling would bring."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["quantization"]), []).append(result)
    return [
        {"method": m, "quantization": q, **metrics.doubling([r["rows"] for r in g], [r["row_losses"] for r in g])}
        for (m, q), g in groups.items()
        if len({r["rows"] for r in g}) >= 3 and all(r["row_losses"] for r in g)
    ]


def with_interval(values: dict[str, Any], key: str, digits: int) -> str:
    low, high = values[f"{key}_ci"]
    return f"{values[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(results: Sequence[dict[str, Any]], others: Mapping[str, str], scaling: Sequence[dict[str, Any]]) -> str:
    """The comparison as a Markdown table; others: why a job has no result."""

    def cell(show: Callable[[dict[str, Any]], str], result: dict[str, Any]) -> str:
        try:
            return show(result)
        except KeyError:
            return "–"

    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    rows += [[cell(show, r) for show in COLUMNS.values()] for r in results]
    rows += [[name, reason.replace("|", "/"), *[""] * (len(COLUMNS) - 2)] for name, reason in others.items()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for law in scaling:
        formula = f"{law['E']:.4f} + {law['B']:.3g} / rows^{law['beta']:.2f}"
        gain = f"{law['gain']:.4f} [{law['ci'][0]:.4f}, {law['ci'][1]:.4f}]"
        name = f"{law['method']} ({law['quantization']})"
        lines.append(f"\n{name}: loss = {formula}; twice the data would lower it by {gain}")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out loss over the share of trained parameters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for r in results:
        loss = r["metrics"].get("loss", math.nan)
        if "trainable_parameters" not in r:
            axes.axhline(loss, color="grey", linestyle="--", linewidth=1, label=r["name"])
            continue
        share = r["trainable_parameters"] / r["total_parameters"]
        axes.scatter(share, loss)
        axes.annotate(r["name"], (share, loss), xytext=(4, 4), textcoords="offset points")
    axes.legend()
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xlabel("share of trained parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
    pyplot.close(figure)
