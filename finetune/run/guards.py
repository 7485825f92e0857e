"""What a run may write over, and what it may not: nothing that no run of ours wrote, and nothing that it reads."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from finetune import places
from finetune.errors import Problem, UserError
from finetune.recipe.sections import SourceConfig, as_list, held_sets
from finetune.recipe.stages import Recipe
from finetune.run.checkpoints import named, not_ours
from finetune.run.directory import ASIDE, CONTENTS, FAILED, LOCK, MARK, Run, read_recipe, resumable, section_of

WEIGHTS = ("", ".json", ".safetensors", ".jinja", ".model", ".bin", ".pt")  # what lies in adapter/ and model/
DATA_KEYS = ("data.train", "eval.data", "reward.train", "eval.shots_from")


def check_output(
    directory: str | Path, overwrite: bool, resume: bool, say: Callable[[str], None] | None = None,
    further: bool = False,
) -> None:  # fmt: skip
    """UserError if results would be lost or written where they must not be. Writes nothing.

    Args:
        say: told when something is there already, which then is no error.
        further: whether more steps are asked for than the run was started with: then a finished one goes on, too.
    """
    run = Run(Path(directory).expanduser())
    places.check_folder(run.path, "output.dir")
    check_links(run)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", fix="give one of them")
    if resume:
        if run.result.exists() and not further:
            fix = f"use --overwrite, or ask for more, as with --set {twice(run)}"
            raise UserError("this run is finished, there is nothing to resume", path=run.path, fix=fix)
        check_checkpoints(run)
        if not resumable(run):
            raise UserError("holds no complete checkpoint", path=run.checkpoints, fix="start it again with --overwrite")
    elif overwrite:
        check_ours(run)
    elif (there := taken(run)) is not None and say is not None:
        say(f"{there}; this dry run goes on")
    elif there is not None:
        raise UserError(there)


def taken(run: Run) -> Problem | None:
    """What a run that neither goes on nor overwrites finds in its way."""
    if run.result.exists() and is_ours(run):
        fix = "use --output DIR or --overwrite"
        return Problem("already holds the results of a run", path=run.path, key="output.dir", fix=fix)
    if run.path.exists() and any(path.name != LOCK for path in run.path.iterdir()):
        choices = ["--resume to go on"] if resumable(run) else []
        choices += ["--overwrite to start again"] if is_ours(run) or (run.path / ASIDE).is_dir() else []
        choices += ["--output DIR"]
        return Problem("already holds files", path=run.path, key="output.dir", fix=f"use {', or '.join(choices)}")
    return None


def is_ours(run: Run) -> bool:
    """Whether a run of ours, finished or not, wrote what is in this directory.

    Its recipe.yaml says so, and names this directory: a copy of it says nothing about the files beside it. A finished
    run may have been moved.
    """
    path = run.path / "recipe.yaml"
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        named = Path(values["output"]["dir"]).resolve() == run.path.resolve()
        stage = values["stage"]
    except (OSError, UnicodeError, yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError):
        return False
    result = places.read_json(run.result)
    return (result.get("stage") == stage and places.made_by_ft(result)) or (named and MARK in text)


def twice(run: Run) -> str:
    """The key that says how long a run was, and twice its value: steps override epochs."""
    try:
        train = section_of(read_recipe(run.path), "train")
    except UserError:
        train = {}
    steps, epochs = train.get("max_steps"), train.get("num_train_epochs")
    if isinstance(steps, int):
        return f"train.max_steps={2 * steps}"
    return f"train.num_train_epochs={2 * epochs if isinstance(epochs, int | float) else 6:g}"


def check_checkpoints(run: Run) -> None:
    """UserError for what stands where a checkpoint goes, and when no checkpoint says any more what is in it."""
    for path in named(run.checkpoints):
        if not path.is_dir():
            what = "is no folder, and stands where a checkpoint goes"
            raise UserError(what, path=path, key="output.dir", fix="move it away, or use --output DIR")
    if run.complete_checkpoints() and not run.known():
        run.usable_checkpoint()


def check_ours(run: Run) -> None:
    """UserError for anything that --overwrite would take and no run of ours wrote."""
    fix = "move it away, or use --output DIR"
    held = [name for name in CONTENTS if os.path.lexists(run.path / name)]
    if held and not is_ours(run):
        what = f"holds files that no run of ft wrote ({', '.join(held[:3])}{' …' if held[3:] else ''})"
        raise UserError(what, path=run.path, key="output.dir", fix="use --output DIR")
    aside = run.path / ASIDE
    if os.path.lexists(aside) and not (aside.is_dir() and {path.name for path in aside.iterdir()} <= set(CONTENTS)):
        raise UserError("is nothing that ft wrote", path=aside, key="output.dir", fix=fix)
    if (strange := not_ours(run.checkpoints)) is not None:
        raise UserError("is nothing that a run of ft wrote", path=strange, key="output.dir", fix=fix)
    # Conversions of a model are made beside its weights, and are a user's; so are notes.
    weights = [run.path / f"{name}{end}" for name in ("adapter", "model") for end in ("", FAILED)]
    for path in (path for folder in weights if folder.is_dir() for path in folder.iterdir()):
        if path.suffix not in WEIGHTS and path.name not in ("README.md", "vocab.txt", "merges.txt"):
            raise UserError("is nothing that a run of ft wrote", path=path, key="output.dir", fix=fix)


def check_links(run: Run) -> None:
    """UserError for a link where a run writes."""
    held = [run.path / name for name in (*CONTENTS, LOCK, ASIDE)]
    for path in (*held, *(path for folder in held if folder.is_dir() for path in folder.rglob("*"))):
        if path.is_symlink():
            what = "is a link, and nothing is written through links"
            raise UserError(what, path=path, key="output.dir", fix="put the file itself there, or use --output DIR")


def check_inputs(recipe: Recipe, reference: Path | None = None) -> None:
    """UserError when something that the run reads is what --overwrite replaces.

    Args:
        reference: the recipe's file. The run's own recipe.yaml may be run again.
    """
    places.check_folder(Run.of(recipe).path, "output.dir")
    directory = Run.of(recipe).path.resolve()
    going = [directory / name for name in (*CONTENTS, ASIDE)]
    given = [(key, [path, path / "adapter", path / "model"]) for key, path in model_inputs(recipe)]
    given += [(key, paths_of(pattern)) for key, pattern in data_inputs(recipe)]
    if reference is not None and reference.resolve() != directory / "recipe.yaml":
        given.append(("--recipe", [reference]))
    problems = []
    for key, paths in given:
        whole = key in DATA_KEYS and paths[0].is_dir()  # all that is below it is read
        read = {path.resolve() for path in (*paths, *links_in(paths[0], whole)) if os.path.exists(path)}
        inside = any(path.is_relative_to(gone) for path in read for gone in going)
        if inside or directory in read or (whole and read & set(directory.parents)):
            problems.append((str(paths[0]), key))
    if problems:
        fix = "use --output DIR, or move it away"
        raise UserError([Problem("would be deleted by --overwrite", path=p, key=k, fix=fix) for p, k in problems])


def model_inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """(key, place) of the models, adapters and single files that a recipe may name; places need not exist."""
    for key, text in strings(recipe.model_dump(include={"model", "reward"})):
        text = text.rpartition(":")[0] if key == "reward.functions" else text
        if text and key != "reward.train" and "\0" not in text:
            yield key, Path(text).expanduser()


def data_inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, file, folder or pattern) of all data."""
    for key in DATA_KEYS:
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section, None), name, None)
        for source in [one.path for one in held_sets(value)] if key == "eval.data" else as_list(value):
            text = source.path if isinstance(source, SourceConfig) else source
            if isinstance(text, str) and "\0" not in text:
                yield key, text


def paths_of(pattern: str) -> list[Path]:
    """The pattern itself, and what it matches."""
    path = Path(pattern).expanduser()
    return [path, *(Path(found) for found in glob.glob(str(path), recursive=True) if glob.has_magic(pattern))]


def links_in(folder: Path, deep: bool) -> list[Path]:
    """A folder of links reads what they lead to."""
    return [path for path in folder.glob("**/*" if deep else "*") if path.is_symlink()] if folder.is_dir() else []


def strings(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from strings(value, key)
