"""Each job in processes of its own: the search for its learning rate, the run, its measurement; what is done stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune import child
from finetune.adapters.methods import METHODS
from finetune.commands.compare import plan
from finetune.errors import Interrupted, RunError, UserError
from finetune.recipe.file import to_yaml
from finetune.recipe.stages import SftRecipe
from finetune.run.directory import Run
from finetune.run.writing import write_atomically


def done(job: plan.Job, folder: Path) -> bool:
    return (folder / job.name / "measured.json").exists()


def measure_base(recipe: SftRecipe, kind: str, folder: Path) -> dict[str, Any]:
    """The base without any adapter, on the same held-out rows."""
    name = f"base{'' if kind == 'none' else '-' + kind}"
    where = folder / name
    if not (where / "measured.json").exists():
        where.mkdir(exist_ok=True)
        model = recipe.model.model_copy(update={"quantization": None if kind == "none" else kind})
        write_atomically(where / "recipe.yaml", to_yaml(recipe.model_copy(update={"model": model})))
        measured(where)
    found = json.loads((where / "measured.json").read_text(encoding="utf-8"))
    return {"name": name, "method": "none", "quantization": kind, **found}


def run_job(job: plan.Job, recipe: SftRecipe, rows: int, folder: Path) -> dict[str, Any]:
    """Search, train and measure one job; what is on disk already is read. RunError when it failed."""
    where = folder / job.name
    search = search_rate(job, recipe, rows, folder)
    tried = [s for s in search if s["validation_loss"] is not None]
    if not tried:
        raise RunError(f"the loss became NaN at every learning rate: {', '.join(s['error'] for s in search[:1])}")
    best = min(tried, key=lambda s: s["validation_loss"])
    train(plan.with_settings(recipe, {"learning_rate": best["learning_rate"]}), where)
    if not (where / "measured.json").exists():
        measured(where)
    return {
        "name": job.name, "method": job.method, "quantization": job.quantization, "fraction": job.fraction,
        "learning_rate": best["learning_rate"], "search": search,
        **json.loads((where / "measured.json").read_text(encoding="utf-8")),
    }  # fmt: skip


def search_rate(job: plan.Job, recipe: SftRecipe, rows: int, folder: Path) -> list[dict[str, Any]]:
    """Short runs around the method's usual learning rate; the loss is that of rows held out of the training data."""
    centre = recipe.train.learning_rate * METHODS[job.method].learning_rate
    short = plan.short_steps(recipe)
    held_out = max(1, round(rows * plan.SEARCH_ROWS))
    tried = []
    for factor in plan.FACTORS:
        rate = float(f"{centre * factor:.3g}")
        settings = {"learning_rate": rate, "max_steps": short, "eval_steps": short, "warmup_steps": plan.SHORT_WARMUP}
        trial = plan.with_settings(recipe, settings, {"eval_split": held_out})
        where = folder / "search" / f"{job.name}-{rate:g}"
        found: dict[str, Any] = {"learning_rate": rate, "validation_loss": None}
        try:
            train(trial, where)
            loss = json.loads((where / "result.json").read_text(encoding="utf-8"))["eval"]["loss"]
            found["validation_loss"] = loss if math.isfinite(loss) else None
        except RunError as error:  # too high a rate for this method: one of those the search is there to find
            found["error"] = str(error)
        tried.append(found)
    return tried


def train(recipe: SftRecipe, where: Path) -> None:
    """`ft sft` in its own process, so that memory figures are clean; a finished run is kept."""
    run = Run(where)
    if run.done():
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    file = where.with_name(where.name + ".yaml")  # with_suffix would cut lora-0.25 at its point
    write_atomically(file, to_yaml(recipe))
    mode = "--resume" if run.last_checkpoint() and not run.result.exists() else "--overwrite"
    process("sft", "--recipe", str(file), "--output", str(where), mode)


def measured(where: Path) -> None:
    """Writes measured.json, whole or not at all."""
    process(str(where), str(where / "measured.json"), module="finetune.commands.compare.measure")


def process(*arguments: str, module: str = "finetune") -> None:
    """A job, or its measurement, in a process of its own. Interrupted after a signal, which has reached it, too;
    UserError and RunError with its own words when it exits with 2 or otherwise."""
    code, said = child.run(*arguments, module=module)
    last = said.splitlines()[-1] if said else ""
    if code == 130:
        raise Interrupted("stopped; the same command goes on from here")
    if code == 2:
        raise UserError(last)
    if code:
        raise RunError(f"ft {arguments[0]} exited with {code}: {last}")
