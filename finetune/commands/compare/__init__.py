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

import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune import child, metrics
from finetune.adapters.methods import METHODS
from finetune.data import audit, held_out, samples
from finetune.errors import Interrupted, RunError, UserError
from finetune.places import check_folder as check_place
from finetune.recipe.file import check, to_yaml
from finetune.recipe.stages import SftRecipe
from finetune.run.directory import Run
from finetune.run.resuming import changed_keys
from finetune.run.writing import write_atomically, write_json, write_lines
from finetune.terminal.progress import command, duration, note, say

FACTORS = (1 / 3, 1.0, 3.0)
SEARCH_STEPS, SEARCH_ROWS = 0.25, 0.1  # share of the budget, and of the training rows that are held out for it
SHORT_WARMUP = 0.1  # share of a short run
MARK = "comparison.yaml"  # the recipe; a folder with it is a comparison


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
    names, kinds, texts = (listed(text) for text in (methods, quantization, fractions))
    for name in names:
        if name not in METHODS:
            raise UserError(f"unknown method {name!r}", key="--methods", fix=f"of {', '.join(METHODS)}")
    for kind in kinds:
        if kind not in ("none", "int8", "int4"):
            raise UserError(f"unknown kind {kind!r}", key="--quantization", fix="of none, int8, int4")
    try:
        shares = [float(text) for text in texts]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"not shares: {fractions}", key="--data-fractions", fix="numbers above 0, up to 1")
    return names, kinds, shares


def listed(text: str) -> list[str]:
    """Separated by commas, each once, in their order."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def run(
    recipe: SftRecipe, methods: Sequence[str], quantizations: Sequence[str], fractions: Sequence[float], output: str
) -> None:
    folder = Path(output)
    check_folder(folder, recipe)
    jobs = [Job(m, q, f) for f in fractions for q in quantizations for m in methods]
    counts, recipes, refused = check_jobs(recipe, jobs)  # everything that can be checked, before anything runs
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MARK, to_yaml(recipe))
    note(search_in_words(recipes))
    if recipe.eval.data is None:
        apart = held_apart(recipe, folder)
        counts = count_rows(apart)
        recipes = {job: job_recipe(apart, job, counts) for job in recipes}
        measure_on = apart
    else:
        measure_on = recipe
    rows, reasons = [measure_base(measure_on, kind, folder) for kind in quantizations], dict(refused)
    seconds = steps = 0.0  # of the jobs that were trained now
    for number, job in enumerate(recipes, 1):
        begun, there = time.perf_counter(), done(job, folder)
        try:
            result = run_job(job, recipes[job], sum(share_of(counts, job.fraction)), folder)
        except RunError as error:
            reasons[job] = f"failed: {error}"
            note(f"{number}/{len(recipes)} {job.name} {reasons[job]}")
            continue
        rows.append(result)
        score = result["metrics"].get("exact_match", result["metrics"].get("loss", math.nan))
        took = time.perf_counter() - begun
        said = f"{score:.3f} at learning rate {result['learning_rate']:.3g} ({duration(took)})"
        if not there:
            seconds, steps = seconds + took, steps + steps_with_search(recipes[job])
        left = sum(steps_with_search(r) for j, r in recipes.items() if not done(j, folder) and j not in reasons)
        about = f"; about {duration(seconds / steps * left)} left" if steps and left else ""
        note(f"{number}/{len(recipes)} {job.name}: {said}{about}")
    trained = [row for row in rows if "learning_rate" in row]
    scaling = scaling_laws(trained)
    public = [{k: v for k, v in r.items() if k != "row_losses"} for r in rows]
    others = {job.name: reason for job, reason in reasons.items()}
    write_json(
        folder / "compare.json", {"recipe": to_yaml(recipe), "jobs": public, "not_done": others, "scaling": scaling}
    )
    table = markdown(rows, others, scaling)
    write_atomically(folder / "compare.md", table)
    plot(rows, folder / "compare.png")
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


def done(job: Job, folder: Path) -> bool:
    return (folder / job.name / "measured.json").exists()


def short_steps(recipe: SftRecipe) -> int:
    """Of each run of the search for the learning rate."""
    assert recipe.train.max_steps is not None
    return max(1, round(recipe.train.max_steps * SEARCH_STEPS))


def steps_with_search(recipe: SftRecipe) -> int:
    """Of a whole job."""
    assert recipe.train.max_steps is not None
    return len(FACTORS) * short_steps(recipe) + recipe.train.max_steps


def search_in_words(recipes: Mapping[Job, SftRecipe]) -> str:
    """What is going to happen, and how much it is."""
    total = sum(map(steps_with_search, recipes.values()))
    rates = ", ".join(f"{factor:.2g}" for factor in FACTORS)
    return (
        f"{len(recipes)} jobs, {total:,} steps: for each first its learning rate, from {len(FACTORS)} short runs at "
        f"{rates} times what is usual for the method ({SEARCH_STEPS:.0%} of the steps each, scored on "
        f"{SEARCH_ROWS:.0%} of the training rows, which they do not see), then the run itself and its measurement; "
        "when the first is done it is told how long the others take"
    )


def check_folder(folder: Path, recipe: SftRecipe) -> None:
    """UserError when `folder` is not a comparison, or one of another recipe: neither may be mixed or overwritten."""
    fix = "use --output DIR"
    check_place(folder, "--output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARK).exists():
        raise UserError("holds files that are no comparison", path=folder, key="--output", fix=fix)
    old = yaml.safe_load((folder / MARK).read_text(encoding="utf-8"))
    if keys := changed_keys(old, yaml.safe_load(to_yaml(recipe))):
        what = f"holds a comparison with other values of {', '.join(keys[:5])}"
        raise UserError(what, path=folder, key="--output", fix=fix)


def check_recipe(recipe: SftRecipe) -> None:
    if recipe.eval.data is None and recipe.data.eval_split is None:
        fix = "set it or data.eval_split in the recipe"
        raise UserError("a comparison needs held-out data", key="eval.data", fix=fix)
    if recipe.model.adapter is not None:
        what = "every method would train the adapter that it names"
        raise UserError(what, key="model.adapter", fix="leave it out")


def check_jobs(recipe: SftRecipe, jobs: Sequence[Job]) -> tuple[list[int], dict[Job, SftRecipe], dict[Job, str]]:
    """(rows of each source, recipes of what can be, reasons for what cannot).

    UserError when nothing can be, or data or targets are wrong.
    """
    check_recipe(recipe)
    counts = count_rows(recipe)
    sizes = {sum(share_of(counts, job.fraction)) for job in jobs}
    if len({job.fraction for job in jobs}) > len(sizes):
        raise UserError("several shares are the same number of rows", key="--data-fractions", fix="use fewer or larger")
    if recipe.eval.data is not None:
        held_out.load_eval_rows(recipe.eval.data, recipe.data)
    else:
        split_off(recipe)

    # torch takes its time: what can be wrong without it is said by now
    from finetune.adapters import compatibility
    from finetune.adapters.methods import check as check_targets
    from finetune.models import loading

    recipes: dict[Job, SftRecipe] = {}
    refused: dict[Job, str] = {}
    errors = []
    for job in jobs:
        built = job_recipe(recipe, job, counts)
        check_targets(loading.skeleton(built.model), built.adapter)
        try:
            compatibility.check(built)
            recipes[job] = built
        except UserError as error:
            errors.append(error)
            refused[job] = f"refused: {error.problems[0].message}"
    if not recipes:
        raise errors[0]
    return counts, recipes, refused


def split_off(recipe: SftRecipe) -> held_out.HeldOut:
    """The rows that `ft sft` of this recipe would hold out."""
    from finetune.base import Base

    return held_out.split_off(recipe, Base.open(recipe.model).encoder, None)


def held_apart(recipe: SftRecipe, folder: Path) -> SftRecipe:
    """The recipe with the rows that data.eval_split holds out as its test data, and without them in its training data:
    the search for the learning rate holds out others, and must not see these."""
    held = split_off(recipe)
    place = folder / "data"
    place.mkdir(exist_ok=True)
    write_lines(place / "test.jsonl", [as_row(row.sample, row.group) for row in held.rows])
    assert held.hashes is not None
    sources = []
    for number, spec in enumerate(samples.specs(recipe.data), 1):
        items = samples.read_samples(spec, recipe.data, seed=recipe.train.seed)
        kept = [i.sample for i in items if i.sample is not None and i.sample.content_hash not in held.hashes]
        write_lines(place / f"train-{number}.jsonl", [as_row(sample) for sample in kept])
        sources.append({"path": str(place.resolve() / f"train-{number}.jsonl"), "weight": spec.get("weight", 1.0)})
    note(f"measured on the {len(held.rows)} rows that data.eval_split holds out, which no job is trained on")
    values = yaml.safe_load(to_yaml(recipe))
    own = {"train": sources, "eval_split": None, "format": None, "columns": None, "max_samples": None, "shuffle": False}
    values["data"] = {**values["data"], **own}
    values["eval"] = {**values["eval"], "data": str(place.resolve() / "test.jsonl")}
    built = check(values, "sft")
    assert isinstance(built, SftRecipe)
    return built


def as_row(sample: Any, group: str | None = None) -> dict[str, Any]:
    row = {"messages": sample.messages, "tools": sample.tools, "group": group}
    return {key: value for key, value in row.items() if value}


def job_recipe(recipe: SftRecipe, job: Job, counts: Sequence[int]) -> SftRecipe:
    """The recipe of one job; counts: rows of each source, of which a share is drawn at random."""
    values = yaml.safe_load(to_yaml(recipe))
    if values["adapter"]["method"] != job.method:
        values["adapter"] = {"method": job.method}
    values["model"]["quantization"] = None if job.quantization == "none" else job.quantization
    if job.fraction < 1:
        used = zip(samples.specs(recipe.data), share_of(counts, job.fraction), strict=True)
        values["data"]["train"] = [{**spec, "max_samples": count} for spec, count in used]
        values["data"]["shuffle"] = True
    steps = recipe.train.max_steps or steps_of(recipe, sum(share_of(counts, job.fraction)))
    if recipe.train.warmup_steps >= steps:  # made for all rows
        values["train"]["warmup_steps"] = SHORT_WARMUP
    values["train"].update({"load_best_model_at_end": False, "early_stopping_patience": None, "max_steps": steps})
    built = check(values, "sft")
    assert isinstance(built, SftRecipe)
    return built


def count_rows(recipe: SftRecipe) -> list[int]:
    """Of each source, as far as max_samples lets them be used."""
    parts = [recipe.data.model_copy(update={"train": [spec]}) for spec in samples.specs(recipe.data)]
    return [len(audit.load_samples(part, "sft")) for part in parts]


def share_of(counts: Sequence[int], fraction: float) -> list[int]:
    return [max(1, round(fraction * count)) for count in counts]


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


def run_job(job: Job, recipe: SftRecipe, rows: int, folder: Path) -> dict[str, Any]:
    """Search, train and measure one job; what is on disk already is read. RunError when it failed."""
    where = folder / job.name
    search = search_rate(job, recipe, rows, folder)
    tried = [s for s in search if s["validation_loss"] is not None]
    if not tried:
        raise RunError(f"the loss became NaN at every learning rate: {', '.join(s['error'] for s in search[:1])}")
    best = min(tried, key=lambda s: s["validation_loss"])
    train(with_settings(recipe, {"learning_rate": best["learning_rate"]}), where)
    if not (where / "measured.json").exists():
        measured(where)
    return {
        "name": job.name, "method": job.method, "quantization": job.quantization, "fraction": job.fraction,
        "learning_rate": best["learning_rate"], "search": search,
        **json.loads((where / "measured.json").read_text(encoding="utf-8")),
    }  # fmt: skip


def search_rate(job: Job, recipe: SftRecipe, rows: int, folder: Path) -> list[dict[str, Any]]:
    """Short runs around the method's usual learning rate; the loss is that of rows held out of the training data."""
    centre = recipe.train.learning_rate * METHODS[job.method].learning_rate
    short = short_steps(recipe)
    held_out = max(1, round(rows * SEARCH_ROWS))
    tried = []
    for factor in FACTORS:
        rate = float(f"{centre * factor:.3g}")
        settings = {"learning_rate": rate, "max_steps": short, "eval_steps": short, "warmup_steps": SHORT_WARMUP}
        trial = with_settings(recipe, settings, {"eval_split": held_out})
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


def steps_of(recipe: SftRecipe, rows: int) -> int:
    per_epoch = math.ceil(rows / recipe.train.effective_batch_size)
    return math.ceil(per_epoch * recipe.train.num_train_epochs)


def with_settings(recipe: SftRecipe, train: dict[str, Any], data: dict[str, Any] | None = None) -> SftRecipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update=train), "data": recipe.data.model_copy(update=data or {})}
    )


def train(recipe: SftRecipe, where: Path) -> None:
    """`ft sft` in its own process, so that memory figures are clean; a finished run is kept."""
    run = Run(where)
    if run.result.exists():
        return
    where.parent.mkdir(parents=True, exist_ok=True)
    file = where.with_name(where.name + ".yaml")  # with_suffix would cut lora-0.25 at its point
    write_atomically(file, to_yaml(recipe))
    mode = "--resume" if run.last_checkpoint() else "--overwrite"
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
