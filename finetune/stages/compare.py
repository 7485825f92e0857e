"""`ft compare`: methods side by side on the same data and budget, each job in a process of its own, all measured.

    for each method x quantization x share of the data
        search the learning rate on rows held out of the training data (never on the test data)
        ft sft … in a process           -> run directory
        measure(run) in a process       -> metrics with intervals, memory, speed, size
    compare.json, compare.md, compare.png

A job that is done is not done again: an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune import metrics
from finetune.errors import RunError, UserError
from finetune.progress import duration, note
from finetune.recipe import SftRecipe
from finetune.recipe_file import check, to_yaml
from finetune.run import write_atomically, write_json

# Where the search for the learning rate begins, relative to LoRA's: what moves few or shared numbers needs more.
CENTRE = {
    "full": 0.1, "last_layers": 0.1, "bitfit": 3.0, "ia3": 3.0, "ln_tuning": 3.0, "vera": 3.0, "prompt_tuning": 10.0,
    "p_tuning": 3.0, "prefix_tuning": 3.0,
}  # fmt: skip
FACTORS = (1 / 3, 1.0, 3.0)
SEARCH_STEPS, SEARCH_ROWS = 0.25, 0.1  # share of the budget, and of the training rows that are held out for it


@dataclass(frozen=True)
class Job:
    method: str
    quantization: str
    fraction: float

    @property
    def name(self) -> str:
        share = "" if self.fraction == 1 else f"-{self.fraction:g}"
        return f"{self.method}{'' if self.quantization == 'none' else '-' + self.quantization}{share}"


def parse(methods: str, quantization: str, fractions: str) -> tuple[list[str], list[str], list[float]]:
    """The command line's lists. UserError for what is not possible."""
    from finetune.recipe import ADAPTERS

    names, kinds = methods.split(","), quantization.split(",")
    for name in names:
        if name not in ADAPTERS:
            raise UserError(f"unknown method {name!r}", key="--methods", fix=f"of {', '.join(ADAPTERS)}")
    for kind in kinds:
        if kind not in ("none", "int8", "int4"):
            raise UserError(f"unknown kind {kind!r}", key="--quantization", fix="of none, int8, int4")
    try:
        shares = [float(text) for text in fractions.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"not shares: {fractions}", key="--data-fractions", fix="numbers above 0, up to 1")
    return names, kinds, shares


def run(
    recipe: SftRecipe, methods: Sequence[str], quantizations: Sequence[str], fractions: Sequence[float], output: str
) -> None:
    jobs = [Job(m, q, f) for f in fractions for q in quantizations for m in methods]
    if recipe.eval.data is None:
        raise UserError("a comparison needs held-out data", key="eval.data", fix="set it in the recipe")
    recipes = {job: job_recipe(recipe, job) for job in jobs}  # every combination is checked before anything runs
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for number, job in enumerate(jobs, 1):
        begun = time.perf_counter()
        result = run_job(job, recipes[job], folder)
        results.append(result)
        score = result["metrics"].get("exact_match", result["metrics"].get("loss", math.nan))
        took = duration(time.perf_counter() - begun)
        note(f"{number}/{len(jobs)} {job.name}: {score:.3f} at learning rate {result['learning_rate']:.3g} ({took})")
    scaling = scaling_laws(results) if len(set(fractions)) >= 3 else []
    public = [{k: v for k, v in r.items() if k != "row_losses"} for r in results]
    write_json(folder / "compare.json", {"recipe": to_yaml(recipe), "jobs": public, "scaling": scaling})
    table = markdown(results, scaling)
    write_atomically(folder / "compare.md", table)
    plot(results, folder / "compare.png")
    print(table)
    note(f"written to {folder}/compare.json, compare.md, compare.png")


def job_recipe(recipe: SftRecipe, job: Job, **train: Any) -> SftRecipe:
    """The recipe of one job. UserError for combinations that cannot be."""
    values = yaml.safe_load(to_yaml(recipe))
    if values["adapter"]["method"] != job.method:
        values["adapter"] = {"method": job.method}
    values["model"]["quantization"] = None if job.quantization == "none" else job.quantization
    if job.fraction < 1:
        values["data"]["max_samples"] = max(1, round(job.fraction * count_rows(recipe)))
    values["train"].update({"load_best_model_at_end": False, **train})
    built = check(values, "sft")
    assert isinstance(built, SftRecipe)
    from finetune.adapters.limits import check as check_limits

    check_limits(built)
    return built


def count_rows(recipe: SftRecipe) -> int:
    from finetune.data.dataset import load_samples

    return len(load_samples(recipe.data, "sft"))


def run_job(job: Job, recipe: SftRecipe, folder: Path) -> dict[str, Any]:
    """Search, train and measure one job; what is on disk already is read."""
    where = folder / job.name
    done = where / "measured.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    steps = recipe.train.max_steps or steps_of(recipe, count_rows(recipe))
    search = search_rate(job, recipe, folder, steps)
    best = min(search, key=lambda s: s["validation_loss"])
    final = with_settings(recipe, {"learning_rate": best["learning_rate"], "max_steps": steps})
    train(final, where)
    subprocess_run([sys.executable, "-m", "finetune.measuring", str(where), str(where / "measuring.json")])
    result = json.loads((where / "measuring.json").read_text(encoding="utf-8"))
    result |= {
        "name": job.name, "method": job.method, "quantization": job.quantization, "fraction": job.fraction,
        "learning_rate": best["learning_rate"], "search": search,
    }  # fmt: skip
    write_json(done, result)
    (where / "measuring.json").unlink()
    return result


def search_rate(job: Job, recipe: SftRecipe, folder: Path, steps: int) -> list[dict[str, float]]:
    """Short runs around the method's usual learning rate; the loss is that of rows held out of the training data."""
    centre = recipe.train.learning_rate * CENTRE.get(job.method, 1.0)
    tried = []
    for factor in FACTORS:
        rate = float(f"{centre * factor:.3g}")
        short = max(1, round(steps * SEARCH_STEPS))
        settings = {"learning_rate": rate, "max_steps": short, "eval_steps": short, "warmup_steps": 0.1}
        trial = with_settings(recipe, settings, {"eval_split": SEARCH_ROWS})
        where = folder / "search" / f"{job.name}-{rate:g}"
        train(trial, where)
        loss = json.loads((where / "result.json").read_text(encoding="utf-8"))["eval"]["loss"]
        tried.append({"learning_rate": rate, "validation_loss": loss})
    return tried


def steps_of(recipe: SftRecipe, rows: int) -> int:
    per_epoch = math.ceil(rows / recipe.train.effective_batch_size)
    return math.ceil(per_epoch * recipe.train.num_train_epochs)


def with_settings(recipe: SftRecipe, train: dict[str, Any], data: dict[str, Any] | None = None) -> SftRecipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update=train), "data": recipe.data.model_copy(update=data or {})}
    )


def train(recipe: SftRecipe, where: Path) -> None:
    """`ft sft` in its own process, so that memory figures are clean; a finished run is kept."""
    if (where / "result.json").exists():
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    file = where.with_name(where.name + ".yaml")  # with_suffix would cut lora-0.25 at its point
    write_atomically(file, to_yaml(recipe))
    subprocess_run(
        [sys.executable, "-m", "finetune", "sft", "--recipe", str(file), "--output", str(where), "--overwrite"]
    )


def subprocess_run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{' '.join(command[2:])} failed ({done.returncode}): {done.stderr.strip()[-600:]}")


def scaling_laws(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and quantization: loss = E + B / rows^beta, and what doubling the data would bring."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["quantization"]), []).append(result)
    return [
        {"method": m, "quantization": q, **metrics.doubling([r["rows"] for r in g], [r["row_losses"] for r in g])}
        for (m, q), g in groups.items()
    ]


def markdown(results: Sequence[dict[str, Any]], scaling: Sequence[dict[str, Any]]) -> str:
    """The comparison as a Markdown table."""
    heads = ["job", "trainable", "share", "stored", "peak memory", "train tok/s", "backward share",
             "inference overhead", "mergeable",
             "learning rate", "exact match [95%]", "loss"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in results:
        low, high = r["metrics"].get("exact_match_ci", (math.nan, math.nan))
        cells = [
            r["name"], f"{r['trainable_parameters']:,}", f"{r['trainable_parameters'] / r['total_parameters']:.2%}",
            f"{r['adapter_bytes'] / 1e6:.2f} MB", f"{r['peak_memory_gb']:.2f} GB",
            f"{r['train_tokens_per_second']:,.0f}",
            f"{r['backward_share']:.0%}", f"{r['inference_overhead']:+.0%}", r["mergeable"],
            f"{r['learning_rate']:.3g}", f"{r['metrics'].get('exact_match', math.nan):.3f} [{low:.3f}, {high:.3f}]",
            f"{r['metrics'].get('loss', math.nan):.4f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
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
        share = r["trainable_parameters"] / r["total_parameters"]
        axes.scatter(share, r["metrics"].get("loss", math.nan))
        axes.annotate(r["name"], (share, r["metrics"].get("loss", math.nan)), xytext=(4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xlabel("share of trained parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
