"""Going on with an unfinished run: the same recipe, the same content of what is read, and the command that does it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from finetune import ranks
from finetune.errors import Problem, UserError
from finetune.recipe.file import to_yaml
from finetune.recipe.reading import parse_value
from finetune.recipe.stages import Recipe
from finetune.run.directory import Run, read_recipe, resumable
from finetune.run.guards import strings, taken
from finetune.terminal.progress import command, shown_path

# What a recipe may name by another path when a run goes on: it is the content that must be the same.
PLACES = (
    "output.dir", "model.name", "model.gguf_file", "model.adapter",
    "model.tokenizer", "model.chat_template", "data.train", "eval.data", "eval.shots_from",
    "reward.model", "reward.train", "reward.functions",
)  # fmt: skip


# What may change when a run goes on: it changes no weight.
FREE = (
    "train.logging_steps", "train.save_steps", "train.save_total_limit", "train.eval_steps",
    "train.per_device_eval_batch_size", "ppo.log_samples_steps",
)  # fmt: skip
# What changes how a step is computed and not what: the last bits differ.
ROUNDING = (
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.gradient_checkpointing",
    "train.auto_find_batch_size",
)  # fmt: skip
LENGTH = ("train.num_train_epochs", "train.max_steps")


def to_go_on(recipe: Recipe) -> str:
    """The command that goes on with a run."""
    path = shown_path(Run.of(recipe).path / "recipe.yaml")
    return command(recipe.stage, "--recipe", path, "--resume", *ranks.words())


def to_start_again(
    stage: str, reference: str, overrides: Sequence[str], output: str | None, resume: bool, overwrite: bool,
    dry_run: bool, recipe: Recipe | None,
) -> str:  # fmt: skip
    """The command of a run that was interrupted before it had a checkpoint, as it can be given now."""
    begun = recipe is not None and not (resume or dry_run) and taken(Run.of(recipe)) is not None
    flags = {"--resume": resume, "--overwrite": overwrite or begun, "--dry-run": dry_run}
    given = [part for item in overrides for part in ("--set", item)] + (["--output", output] if output else [])
    flagged = [name for name, wanted in flags.items() if wanted]
    return command(stage, "--recipe", reference, *given, *flagged, *ranks.words())


class Again(NamedTuple):
    words: list[str]
    """Of the command line."""
    said: list[str]
    """Its settings, as they stand in a recipe."""


def to_go_on_smaller(
    stage: str, reference: str, overrides: Sequence[str], output: str | None, recipe: Recipe, settings: dict[str, int]
) -> Again:
    """The command that goes on, from the last checkpoint where there is one, with these settings over the others."""
    run = Run.of(recipe)
    given = [*overrides, *(f"{key}={value}" for key, value in settings.items())]
    words = [stage, "--recipe", reference, *(part for item in given for part in ("--set", item))]
    words += ["--output", output] if output else []
    words += ["--resume"] if resumable(run) else ["--overwrite"] if taken(run) is not None else []
    return Again(words, [f"{key} {value}" for key, value in settings.items()])


def check_resumable(recipe: Recipe, unknown: Collection[str] = ()) -> None:
    """UserError naming the keys in which `recipe` differs from the one that the unfinished run was started with.

    Keys and sections that are `unknown` so far are not compared.
    Where the checkpoint knows the content of what is read, a path may be another: see `check_unchanged`.
    """
    run = Run.of(recipe)
    path = run.path / "recipe.yaml"
    old, new = begun_with(run), parse_value(to_yaml(recipe))
    if old is None:
        raise UserError("cannot be read", path=path, fix="start again with --overwrite") from None
    if inputs_of(run):
        old, new = without_places(old), without_places(new)
    free = {*FREE, *ROUNDING, *(LENGTH if goes_further(recipe) else ())}
    keys = [key for key in changed_keys(old, new) if not {key, key.split(".")[0]} & {*free, *unknown}]
    what, fix = "differs from the run to resume", "undo the change or use --output DIR"
    problems = [
        Problem(f"{what}: {shown(value_at(old, key))} then, {shown(value_at(new, key))} now", path, key=key, fix=fix)
        for key in keys
    ]
    if "train.max_steps" in keys or "train.num_train_epochs" in keys:
        problems[-1] = replace(problems[-1], fix=f"{fix}; more steps or epochs may be asked for, fewer not")
    if problems:
        raise UserError(problems)


def begun_with(run: Run) -> dict[str, Any] | None:
    """The resolved recipe that a run was started with, None where it cannot be read."""
    try:
        return read_recipe(run.path)
    except UserError:
        return None


def goes_further(recipe: Recipe) -> bool:
    """Whether more steps or epochs are asked for than the run in its directory was started with."""
    old = (begun_with(Run.of(recipe)) or {}).get("train")
    if not isinstance(old, dict):
        return False
    steps, epochs = (old.get(key.partition(".")[2]) for key in reversed(LENGTH))
    if recipe.train.max_steps is not None or steps is not None:  # which override epochs
        return isinstance(steps, int) and (recipe.train.max_steps or 0) > steps
    return isinstance(epochs, int | float) and recipe.train.num_train_epochs > epochs


def other_rounding(recipe: Recipe, run: Run) -> list[str]:
    """Keys of ROUNDING in which the recipe is another than what the run in `run` was started with."""
    old, new = begun_with(run) or {}, parse_value(to_yaml(recipe))
    return [key for key in ROUNDING[:3] if value_at(old, key) != value_at(new, key)]


def shown(value: Any) -> str:
    """A value in a message, not at its full length."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


SHOWN = 60


def value_at(values: Any, key: str) -> Any:
    """A dotted key of nested mappings; names may hold dots themselves."""
    if isinstance(values, dict):
        for name, value in values.items():
            if key == name:
                return value
            if key.startswith(f"{name}.") and isinstance(value, dict):
                return value_at(value, key[len(name) + 1 :])
    return None


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without the paths of what is known by its content; what else a source says stays."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(item) for item in value]
        if isinstance(value, dict) and "path" not in value:  # sets by name
            return {name: kept(item) for name, item in value.items()}
        return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else bool(value)

    found = dict(values)
    for place in PLACES:
        section, _, key = place.partition(".")
        if key in (found.get(section) or {}):
            found[section] = {**found[section], key: kept(found[section][key])}
    return found


def inputs_of(run: Run) -> dict[str, str]:
    """{key: digest of its content} of what the unfinished run was started with, as its checkpoints say."""
    return run.known().get("inputs") or {}


def check_unchanged(recipe: Recipe, inputs: dict[str, str]) -> None:
    """UserError naming what has another content now than when the unfinished run was started."""
    before = inputs_of(Run.of(recipe))
    values = dict(strings(recipe.model_dump()))
    what, fix = "has another content than when the run to resume was started", "restore it, or use --output DIR"
    problems = []
    for key in sorted(before.keys() | inputs.keys() if before else []):
        (then, size), (now, new_size) = (found.get(key, "").partition(" ")[::2] for found in (before, inputs))
        if then != now:
            sizes = f" ({int(size):,} bytes then, {int(new_size):,} now)" if size and new_size else ""
            problems.append(Problem(what + sizes, path=values.get(key), key=key, fix=fix))
    if problems:
        raise UserError(problems)
