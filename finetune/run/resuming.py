"""Going on with an unfinished run: the same recipe, the same content of what is read, and the command that does it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from finetune.errors import Problem, UserError
from finetune.recipe.file import to_yaml
from finetune.recipe.reading import parse_value
from finetune.recipe.stages import Recipe
from finetune.run.checkpoints import known_of
from finetune.run.directory import Run, read_recipe
from finetune.run.guards import strings, taken
from finetune.terminal.progress import command, shown_path

# What a recipe may name by another path when a run goes on: it is the content that must be the same.
PLACES = (
    "output.dir", "model.name", "model.gguf_file", "model.adapter",
    "model.tokenizer", "model.chat_template", "data.train", "eval.data", "eval.shots_from",
    "reward.model", "reward.train", "reward.functions",
)  # fmt: skip


def to_go_on(recipe: Recipe) -> str:
    """The command that goes on with a run."""
    return command(recipe.stage, "--recipe", shown_path(Run.of(recipe).path / "recipe.yaml"), "--resume")


def to_start_again(
    stage: str, reference: str, overrides: Sequence[str], output: str | None, resume: bool, overwrite: bool,
    dry_run: bool, recipe: Recipe | None,
) -> str:  # fmt: skip
    """The command of a run that was interrupted before it had a checkpoint, as it can be given now."""
    begun = recipe is not None and not (resume or dry_run) and taken(Run.of(recipe)) is not None
    flags = {"--resume": resume, "--overwrite": overwrite or begun, "--dry-run": dry_run}
    given = [part for item in overrides for part in ("--set", item)] + (["--output", output] if output else [])
    return command(stage, "--recipe", reference, *given, *(name for name, wanted in flags.items() if wanted))


def check_resumable(recipe: Recipe, unknown: Collection[str] = ()) -> None:
    """UserError naming the keys in which `recipe` differs from the one that the unfinished run was started with.

    Keys and sections that are `unknown` so far are not compared.
    Where the checkpoint knows the content of what is read, a path may be another: see `check_unchanged`.
    """
    run = Run.of(recipe)
    path = run.path / "recipe.yaml"
    try:
        old = read_recipe(run.path)
    except UserError:
        old = None
    if old is None:
        raise UserError("cannot be read", path=path, fix="start again with --overwrite")
    new = parse_value(to_yaml(recipe))
    if inputs_of(run):
        old, new = without_places(old), without_places(new)
    keys = [key for key in changed_keys(old, new) if key not in unknown and key.split(".")[0] not in unknown]
    if keys:
        what, fix = "differs from the run to resume", "undo the change or use --output DIR"
        raise UserError([Problem(what, path, key=key, fix=fix) for key in keys])


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
    """{key: digest of its content} of what the unfinished run was started with, as its newest checkpoint says."""
    last = run.last_checkpoint()
    return known_of(last).get("inputs") or {} if last is not None else {}


def check_unchanged(recipe: Recipe, inputs: dict[str, str]) -> None:
    """UserError naming what has another content now than when the unfinished run was started."""
    before = inputs_of(Run.of(recipe))
    values = dict(strings(recipe.model_dump()))
    what, fix = "has another content than when the run to resume was started", "restore it, or use --output DIR"
    problems = [
        Problem(what, path=values.get(key), key=key, fix=fix)
        for key in sorted(before.keys() | inputs.keys() if before else [])
        if before.get(key) != inputs.get(key)
    ]
    if problems:
        raise UserError(problems)
