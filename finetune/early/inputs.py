"""Whether the models, adapters and data that a command is given are there."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from finetune import places
from finetune.data import sources as data_sources
from finetune.errors import Problem, UserError
from finetune.models import sources
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import FAILED
from finetune.terminal.progress import warn

ENDLESS = "builtin:world"


def together(*checks: Callable[[], object]) -> None:
    """One UserError with the problems of all."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


def file(path: str | None, key: str, fix: str) -> None:
    if path is not None and not Path(path).is_file():
        raise UserError("no such file", path=path, key=key, fix=fix)
    if path is not None and not os.access(path, os.R_OK):
        raise UserError("cannot be read: Permission denied", path=path, key=key, fix="check the file's permissions")


def rows(data: Any, key: str, held_out: bool = False) -> None:
    """UserError for data that is not there; of hubs only the client can tell."""
    problems: list[Problem] = []
    for spec in [] if data is None else data_sources.as_dicts(data):
        try:
            if str(spec["path"]) == ENDLESS or spec.get("source") == "modelscope":
                continue
            data_sources.check_keys(spec)
            if not data_sources.is_hub(spec):
                spec = data_sources.held_out(spec) if held_out else spec
                data_sources.files_of(spec["path"], spec.get("split"))
        except UserError as error:
            problems += [Problem(**{**vars(p), "key": p.key or key}) for p in error.problems]
    if problems:
        raise UserError(problems)


def check_not_read(path: Path, data: str, key: str, *also: Path) -> None:
    """UserError where a file that is written is, or would be, part of what is read: the file, its folder, a pattern.

    Args:
        also: what is written with it.
    """
    place = Path(data).expanduser()
    fix = "name another file"
    if place.exists():
        read, full = place.resolve(), path.resolve()
        if read == full or read in full.parents:
            what = "is what is read" if read == full else f"lies in the folder that is read ({data})"
            raise UserError(what, path=path, key=key, fix=fix)
    elif glob.has_magic(data):
        folder = data_sources.root_of(data) or Path()
        whole = (folder.resolve() / place.relative_to(folder)).parts
        if any(matches(one.resolve().parts, whole) for one in (path, *also)):
            raise UserError(f"is among what is read ({data})", path=path, key=key, fix=fix)


def matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether glob would find a path of these parts by this pattern, once it is there."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return matches(parts, pattern[1:]) or (not parts[0].startswith(".") and matches(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def base(model: Any) -> None:
    """UserError when the base, or the tokenizer of a new model, is not there."""
    if not model.is_new:
        sources.check(model)
        sources.check_there(model)
    elif model.tokenizer is not None and not model.tokenizer.startswith("builtin:"):
        sources.check_there(ModelConfig(name=model.tokenizer))


def announce(model: Any) -> None:
    """Say what will be downloaded; a new model has nothing to download."""
    if not model.is_new:
        sources.announce(model)


def there(config: ModelConfig) -> None:
    """UserError for a model that is not; what will be downloaded is said."""
    sources.check_there(config)
    sources.announce(config)


def adapter_and_base(reference: str, model: str | None) -> Path:
    """The folder of an adapter. UserError when it, or the base that it names or is given, is not there."""
    folder = sources.adapter_folder(reference)
    config = sources.base_config(folder, model)
    if model is None and Path(config.name).is_absolute() and not Path(config.name).exists():
        what = f"was trained on {config.name}, which is no longer there"
        raise UserError(what, path=reference, key="--model", fix="give the base's place now")
    there(config)
    if folder.name.endswith(FAILED) and (why := places.read_json(folder.parent / "result.json").get("failed")):
        warn(f"{folder}: a check failed at the end of its training: {why}")
    return folder


def reward_model(reference: str, key: str = "reward.model") -> None:
    """A reward model: a run of `ft reward`, or a model."""
    sources.check_usable(Path(reference).expanduser(), key)
    if (folder := sources.find_adapter(reference)) is not None:
        if places.read_json(folder / "adapter_config.json").get("task_type") != "SEQ_CLS":
            raise UserError("has no score head", path=reference, key=key, fix="give a run of `ft reward`")
        return
    if (Path(reference).expanduser() / "model").is_dir() or sources.what_is(reference) == "adapter":
        return
    if sources.file(ModelConfig(name=reference), "config.json") is None:
        raise UserError("has no config.json", path=reference, key=key, fix="give a complete model")
