"""`ft compare`: methods side by side on the same data and budget, each job in a process of its own, all measured.

    the bare base, for each quantization
    for each method x quantization x share of the data
        search the learning rate on rows held out of the training data (never on the test data)
        ft sft … in a process           -> run directory
        measure(run) in a process       -> metrics with intervals, memory, speed, size
    compare.json, compare.md, compare.png

A job that is done is not done again, and one that was interrupted goes on from its checkpoint: the folder holds the
recipe of the comparison, and takes no other. What cannot be is a row with its reason, and so is a job that failed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from finetune.commands.compare import jobs, plan
from finetune.commands.compare.table import markdown, plot, scaling_laws
from finetune.errors import RunError
from finetune.recipe.file import to_yaml
from finetune.recipe.stages import SftRecipe
from finetune.run import json_option
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import command, duration, note, say


def run(
    recipe: SftRecipe, *, methods: Sequence[str], quantizations: Sequence[str], fractions: Sequence[float], output: str,
    json_file: str | None = None,
) -> None:  # fmt: skip
    folder = Path(output)
    plan.check_folder(folder, recipe)
    json_option.check(json_file, "jobs", "not_done")
    wanted = [plan.Job(m, q, f) for f in fractions for q in quantizations for m in methods]
    counts, recipes, refused = plan.check_jobs(recipe, wanted)  # everything that can be checked, before anything runs
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / plan.MARK, to_yaml(recipe))
    note(plan.search_in_words(recipes))
    measured_on = recipe
    if recipe.eval.first is not None and len(recipe.eval.sets) > 1:
        note(f"measured on {recipe.eval.first.name} alone, of the sets in eval.data")
    if recipe.eval.data is None:
        measured_on = plan.held_apart(recipe, folder)
        counts = plan.count_rows(measured_on)
        recipes = {job: plan.job_recipe(measured_on, job, counts) for job in recipes}
    rows, reasons = [jobs.measure_base(measured_on, kind, folder) for kind in quantizations], dict(refused)
    seconds = steps = 0.0  # of the jobs that were trained now
    for number, job in enumerate(recipes, 1):
        begun, there = time.perf_counter(), jobs.done(job, folder)
        try:
            result = jobs.run_job(job, recipes[job], sum(plan.share_of(counts, job.fraction)), folder)
        except RunError as error:
            reasons[job] = f"failed: {error}"
            note(f"{number}/{len(recipes)} {job.name} {reasons[job]}")
            continue
        rows.append(result)
        score = result["metrics"].get("exact_match", result["metrics"].get("loss", math.nan))
        took = time.perf_counter() - begun
        said = f"{score:.3f} at learning rate {result['learning_rate']:.3g} ({duration(took)})"
        if not there:
            seconds, steps = seconds + took, steps + plan.steps_with_search(recipes[job])
        open_ = [r for j, r in recipes.items() if not jobs.done(j, folder) and j not in reasons]
        left = sum(map(plan.steps_with_search, open_))
        about = f"; about {duration(seconds / steps * left)} left" if steps and left else ""
        note(f"{number}/{len(recipes)} {job.name}: {said}{about}")
    trained = [row for row in rows if "learning_rate" in row]
    scaling = scaling_laws(trained)
    public = [{k: v for k, v in r.items() if k != "row_losses"} for r in rows]
    others = {job.name: reason for job, reason in reasons.items()}
    figures = {"recipe": to_yaml(recipe), "jobs": public, "not_done": others, "scaling": scaling}
    write_json(folder / "compare.json", figures)
    json_option.write(json_file, figures)
    table = markdown(rows, others, scaling)
    write_atomically(folder / "compare.md", table)
    plot(rows, folder / "compare.png")
    if json_file != "-":
        say(table)
    if len(fractions) > 1 and not scaling:
        note("no law of loss over data: it takes three shares that all succeeded")
    note(f"written to {folder}/compare.json, compare.md, compare.png")
    if trained:
        best = min(trained, key=lambda r: r["metrics"].get("loss", math.inf))
        note(f"next    {command('eval', folder / best['name'], '--compare-base')}")
    failed = [job.name for job in reasons if job not in refused]
    if failed:
        names = ", ".join(failed)
        raise RunError(f"{len(failed)} of {len(recipes)} jobs failed ({names}); the same command tries them again")
