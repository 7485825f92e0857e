"""What a comparison trains: its jobs, the recipe of each, and why one cannot be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.adapters.methods import METHODS
from finetune.data import audit, held_out, samples
from finetune.data.choices import is_choices
from finetune.errors import UserError
from finetune.places import check_folder as check_place
from finetune.places import is_left
from finetune.recipe.file import check, to_yaml
from finetune.recipe.reading import parse_value, read
from finetune.recipe.stages import SftRecipe
from finetune.run.resuming import changed_keys
from finetune.run.writing import write_lines
from finetune.terminal.progress import note

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


def check_folder(folder: Path, recipe: SftRecipe) -> None:
    """UserError when `folder` is not a comparison, or one of another recipe: neither may be mixed or overwritten."""
    fix = "use --output DIR"
    check_place(folder, "--output")
    if not folder.exists() or all(is_left(path, of=MARK) for path in folder.iterdir()):
        return
    if not (folder / MARK).exists():
        raise UserError("holds files that are no comparison", path=folder, key="--output", fix=fix)
    old = read(folder / MARK)[0]
    if keys := changed_keys(old, parse_value(to_yaml(recipe))):
        what = f"holds a comparison with other values of {', '.join(keys[:5])}"
        raise UserError(what, path=folder, key="--output", fix=fix)


def check_recipe(recipe: SftRecipe) -> None:
    if recipe.eval.data is None and recipe.data.eval_split is None:
        fix = "set it or data.eval_split in the recipe"
        raise UserError("a comparison needs held-out data", key="eval.data", fix=fix)
    first = recipe.eval.first
    if first is not None and is_choices(first.path):
        what = "is multiple choice, and a comparison is measured on answers and their loss"
        raise UserError(what, path=first.path, key="eval.data", fix="give rows with answers; then ft eval RUN …")
    for key in ("during", "metrics", "shots"):
        if getattr(recipe.eval, key):
            what = "has no effect in ft compare, which measures exact match and loss of the bare rows at the end"
            raise UserError(what, key=f"eval.{key}", fix=f"leave it out: --set eval.{key}=null")
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
    if recipe.eval.first is not None:
        held_out.load_eval_rows(recipe.eval.first.path, recipe.data)
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


def steps_of(recipe: SftRecipe, rows: int) -> int:
    per_epoch = math.ceil(rows / recipe.train.effective_batch_size)
    return math.ceil(per_epoch * recipe.train.num_train_epochs)


def with_settings(recipe: SftRecipe, train: dict[str, Any], data: dict[str, Any] | None = None) -> SftRecipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update=train), "data": recipe.data.model_copy(update=data or {})}
    )


def count_rows(recipe: SftRecipe) -> list[int]:
    """Of each source, as far as max_samples lets them be used."""
    parts = [recipe.data.model_copy(update={"train": [spec]}) for spec in samples.specs(recipe.data)]
    return [len(audit.load_samples(part, "sft")) for part in parts]


def share_of(counts: Sequence[int], fraction: float) -> list[int]:
    return [max(1, round(fraction * count)) for count in counts]


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
