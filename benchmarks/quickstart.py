"""`make quickstart`: train, evaluate base and tuned, merge, and print one table. Trains every time.

python benchmarks/quickstart.py [DIR]       DIR: where the run goes (runs/ by default)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

FT = [sys.executable, "-m", "finetune"]


def ft(*arguments: str) -> float:
    """Run a command as a user would; returns its seconds."""
    print("$ ft " + " ".join(arguments), flush=True)
    begun = time.perf_counter()
    subprocess.run([*FT, *arguments], check=True)
    print(flush=True)
    return time.perf_counter() - begun


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    run, merged, figures = folder / "quickstart", folder / "quickstart-merged", folder / "quickstart-eval.json"
    folder.mkdir(parents=True, exist_ok=True)
    seconds = {
        "train": ft("sft", "--recipe", "quickstart.yaml", "--output", str(run), "--overwrite"),
        "eval": ft("eval", str(run), "--compare-base", "--json", str(figures)),
        "merge": ft("merge", "--adapter", str(run), "--output", str(merged), "--overwrite"),
    }
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    base, tuned = json.loads(figures.read_text(encoding="utf-8"))["runs"]
    merge = json.loads((merged / "merge.json").read_text(encoding="utf-8"))

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"quickstart: held-out rows, n={tuned['n']}", title_justify="left")
    for column in ("", "base", "tuned"):
        table.add_column(column, justify="right" if column else "left")
    for key in ("exact_match", "field_accuracy", "loss", "perplexity"):
        table.add_row(key.replace("_", " "), *(f"{r['metrics'].get(key, float('nan')):.3f}" for r in (base, tuned)))
    share = result["trainable_parameters"] / result["total_parameters"]
    table.add_row("trainable parameters", "", f"{result['trainable_parameters']:,} ({share:.1%})")
    table.add_row("training", "", f"{result['seconds']:.0f} s, {result['steps']} steps")
    table.add_row("whole commands", "", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    table.add_row("merged vs unmerged logits", "", f"{merge['max_logit_diff']:.3g} ({merge['dtype']})")
    table.add_row("run", "", str(run))
    table.add_row("merged model", "", str(merged))
    Console().print(table)


if __name__ == "__main__":
    main()
