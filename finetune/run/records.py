"""Run directories as people look at them: which there are below a folder, how far each is, and its figures.

Reads only, and takes what it finds: a run that is going on, was stopped, or lacks files.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from finetune import places
from finetune.errors import UserError
from finetune.recipe.reading import parse_value, recipe_text
from finetune.recipe.stages import RECIPES
from finetune.run.checkpoints import known_of
from finetune.run.directory import ASIDE, LOCK, Run
from finetune.run.writing import read_lines

STATUSES = ("running", "interrupted", "failed", "done")
INSIDE = {"adapter", "model", "checkpoints", "start", ASIDE}  # of a run: no runs are below
FIRST = (
    "reward_difference",
    "exact_match",
    "number_match",
    "rewards/accuracies",
    "accuracy",
    "choice_accuracy",
    "loss",
)
"""The figure of an evaluation that says most, before any other."""


@dataclass(frozen=True)
class Record:
    path: Path
    recipe: dict[str, Any]
    """As recipe.yaml has it; {} where it cannot be read."""
    result: dict[str, Any]
    """Of a finished run; {} otherwise."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def run(self) -> Run:
        return Run(self.path)

    @property
    def stage(self) -> str:
        return str(self.recipe.get("stage") or self.result.get("stage") or "?")

    @property
    def base(self) -> str:
        return str(self.section("model").get("name") or "?")

    @property
    def method(self) -> str:
        stage = RECIPES.get(self.stage)
        usual = stage.model_fields["adapter"].default.method if stage is not None else "?"
        return str(self.section("adapter").get("method") or usual)

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe, or of the result; {} where it is not there."""
        found = self.recipe.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def error(self) -> dict[str, Any]:
        """What an unfinished run ended with, where it could say it."""
        return {} if self.result else places.read_json(self.run.error)

    @cached_property
    def status(self) -> str:
        if self.result:
            return str(self.result.get("status") or "done")
        return "running" if is_held(self.path / LOCK) else "failed" if self.error else "interrupted"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        rows = [row for row in read_lines(self.run.metrics) if is_number(row.get("step"))]
        return sorted(rows, key=lambda row: row["step"])  # the best checkpoint's may come last

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What `ft eval` last found of this run; {} where it was not asked."""
        found = places.read_json(self.run.evaluation)
        if not isinstance(found.get("sets"), list):
            return {}
        return {**found, "sets": [one for given in found["sets"] if (one := evaluated(given)) is not None]}

    @cached_property
    def data_audit(self) -> dict[str, Any]:
        return of_kinds(places.read_json(self.run.data_audit), AUDIT)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """{key: digest of its content} of what the run read, where a checkpoint is left that knows it."""
        last = self.run.last_checkpoint()
        return known_of(last).get("inputs") or {} if last is not None else {}

    @property
    def held_out(self) -> dict[str, Any]:
        """Held-out figures: those of `ft eval` where there are some, otherwise those that the run ended with."""
        for one in self.evaluation.get("sets", []):
            if not one.get("general"):
                return dict(one.get("after") or {})
        found = self.result.get("eval")
        return found if isinstance(found, dict) else {}

    @property
    def seconds(self) -> float | None:
        """That it trained, or has been training so far by its files."""
        if is_number(self.result.get("seconds")):
            return float(self.result["seconds"])
        with suppress(OSError):
            return max(0.0, self.updated - (self.path / "recipe.yaml").stat().st_mtime)
        return None

    @property
    def updated(self) -> float:
        """When something was last written, in seconds since 1970; 0 where nothing is there."""
        times = [0.0]
        for path in (self.run.result, self.run.metrics, self.path / "recipe.yaml"):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)

    @property
    def steps(self) -> int:
        return int(self.result.get("steps") or (self.metrics[-1]["step"] if self.metrics else 0))


def read(path: Path) -> Record:
    """UserError for a folder that is no run, with the nearest that is one."""
    if not is_run(path):
        near = difflib.get_close_matches(path.name, known := near_by(path), n=1)
        fix = f"did you mean {known[near[0]]}?" if near else "`ft runs list` shows the runs below a folder"
        raise UserError("is no run directory" if path.exists() else "no such run", path=path, fix=fix)
    recipe: Any = None
    with suppress(UserError, yaml.YAMLError):
        recipe = parse_value(recipe_text(path / "recipe.yaml"))
    sections = recipe if isinstance(recipe, dict) else {}
    # Files may be half, old, or mended by hand: what is of another kind than ours counts as not there.
    kept = {k: v for k, v in sections.items() if isinstance(v, dict) or k in ("version", "stage")}
    return Record(path, kept, of_kinds(places.read_json(path / "result.json"), RESULT))


def near_by(path: Path) -> dict[str, Path]:
    """{name: run} beside a path and in runs/."""
    places = [*Path("runs").glob("*"), *Path("runs").glob("*/*"), *(path.parent.glob("*") if path.name else ())]
    return {place.name: place for place in places if is_run(place)}


def is_run(path: Path) -> bool:
    """Whether a recipe of ours lies here, with a stage, beside what a run writes; a copy of a recipe is no run."""
    if not (path / "recipe.yaml").is_file():
        return False
    run = Run(path)
    return any(p.exists() for p in (run.result, run.metrics, run.checkpoints, run.error, path / LOCK, run.data_audit))


def of_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Without what should be of a kind and is not; of lists of mappings without what is none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        kind = kinds.get(key)
        if kind == "rows" and isinstance(value, list):
            found[key] = [row for row in value if isinstance(row, dict)]
        elif kind == "number" and is_number(value):
            found[key] = value
        elif kind == "counts" and isinstance(value, dict):
            found[key] = {name: number for name, number in value.items() if is_number(number)}
        elif kind is None or (isinstance(kind, type) and isinstance(value, kind)):
            found[key] = value
    return found


def evaluated(given: Any) -> dict[str, Any] | None:
    """A set of `ft eval`; None for what is none."""
    if not isinstance(given, dict) or not is_number(given.get("n")):
        return None
    one = of_kinds(given, SET)
    one["comparisons"] = [
        item for item in one.get("comparisons", [])
        if isinstance(item.get("metric"), str) and is_number(item.get("difference")) and is_interval(item.get("ci"))
    ]  # fmt: skip
    return one


def is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


RESULT: dict[str, Any] = {
    "stage": str, "status": str, "eval": dict, "decisions": list, "versions": dict, "machine": dict, "plan": dict,
    "data": dict, **dict.fromkeys(
        ("seconds", "steps", "epochs", "train_loss", "trainable_parameters", "total_parameters", "peak_memory_gb"),
        "number"),
}  # fmt: skip
AUDIT: dict[str, Any] = {
    "preview": "rows", "problems": "rows", "kinds": "counts", "tokens": "counts", "characters": "counts",
    "languages": "counts", "counts": dict,
}  # fmt: skip
SET: dict[str, Any] = {"rows": "rows", "comparisons": "rows", "before": dict, "after": dict, "n": "number"}


def below(folder: Path) -> Iterator[Record]:
    """Every run in a folder or below it, the folder itself included, by name. Links are not followed."""
    for place, folders, _ in os.walk(folder):
        here = Path(place)
        if is_run(here):
            folders[:] = [name for name in folders if name not in INSIDE]
            yield read(here)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("node_modules",))


def is_held(lock: Path) -> bool:
    """Whether a process holds this lock; the file alone is also what a kill leaves."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return lock.exists()
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def headline(record: Record) -> tuple[str, float, list[float] | None] | None:
    """(name, value, interval) of the held-out figure that says most, else of the training loss."""
    found = record.held_out
    with_interval = [name for name in found if isinstance(found.get(f"{name}_ci"), list)]
    names = [name for name in FIRST if name in with_interval] + with_interval + [n for n in FIRST if n in found]
    for name in names:
        if is_number(found[name]):
            return name, float(found[name]), found.get(f"{name}_ci")
    if is_number(record.result.get("train_loss")):
        return "train_loss", float(record.result["train_loss"]), None
    last = next((row for row in reversed(record.metrics) if is_number(row.get("loss"))), None)
    return None if last is None else ("loss at the last step", float(last["loss"]), None)


def is_number(value: Any) -> bool:
    """A finite one, which a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested mappings; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
