"""Tasks of lm-evaluation-harness as `ft eval --tasks` names them: read, and looked through before a model is loaded.

A task is a name that the harness knows, a YAML file, or a folder of them; data files that such a task names are looked
for beside it, so that a folder works from everywhere and offline.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.options import HARNESS

KEY = "--tasks"
NAMES = re.compile(r"^(task|group)\s*:", re.MULTILINE)
"""What a YAML file of a task or a group has; others in a folder are something else, or what those include."""


def why(error: BaseException) -> str:
    """What an error and those that it came from say, in a line; what datasets cannot read stands only in the first."""
    first = error
    while first.__cause__ is not None and first.__cause__ is not first:
        first = first.__cause__
    said = [f"{type(one).__name__}: {one}" if str(one) else type(one).__name__ for one in dict.fromkeys((error, first))]
    return " ".join(" / ".join(said).split())[:300]


@contextlib.contextmanager
def problems_of(what: str) -> Iterator[None]:
    """What the harness and datasets raise while tasks are read, as a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        unknown = isinstance(error, KeyError) and what.startswith("task ")
        fix = "`lm_eval ls tasks` lists all" if unknown else "mend the task, or see that its data can be had"
        text = "its data has no rows" if isinstance(error, StopIteration) else why(error)
        raise UserError(f"{what} cannot be read: {text}", key=KEY, fix=fix) from error


def load(names: Sequence[str]) -> list[Any]:
    """Tasks and groups, with their data. UserError for what is not there, and for two of one name."""
    logging.getLogger(HARNESS).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    found: list[Any] = []
    known: Any = None
    for name in names:
        place = Path(name).expanduser()
        if place.is_dir() or place.suffix in (".yaml", ".yml"):
            found += of_place(place)
            continue
        if known is None:
            known = TaskManager()
        with problems_of(f"task {name}"):
            found += whole(known, [name])
    called = [name for one in found for name in names_in(one)]
    if twice := next((name for name in called if called.count(name) > 1), None):
        what = f"two tasks are called {twice}, and one would hide the other"
        raise UserError(what, key=KEY, fix="rename one (`task:` in its YAML file), or measure one after the other")
    return found


def leaves(one: Any) -> list[Any]:
    """The tasks of a group; of a task itself."""
    return list(one.get_all_tasks()) if hasattr(one, "get_all_tasks") else [one]


def names_in(one: Any) -> list[str]:
    """Of a group its own, and those of all in it."""
    groups = [one, *one.get_all_groups()] if hasattr(one, "get_all_groups") else []
    return [*(group.name for group in groups), *(task.task_name for task in leaves(one))]


def of_place(place: Path) -> list[Any]:
    """All that a folder defines, or what a file does."""
    from lm_eval.tasks import TaskManager

    place = place.resolve()
    folder = place if place.is_dir() else place.parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with problems_of(str(place)), beside(folder):
        if not place.is_dir():
            return whole(manager, [str(place)])
        check_files(manager, folder)
        if not (names := [*manager.all_groups, *manager.all_subtasks]):
            raise UserError("defines no task", path=place, key=KEY, fix="lay a YAML file with `task: NAME` into it")
        return whole(manager, names)


def check_files(manager: Any, folder: Path) -> None:
    """UserError for a task's file that the harness passes over without a word: it cannot be read, or has the name of
    another."""
    read = {entry.yaml_path for entry in manager.task_index.values()}
    for path in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path in read or hidden or not NAMES.search(path.read_text(encoding="utf-8", errors="replace")):
            continue
        if path.suffix == ".yml":
            what = "the harness reads only .yaml files of a folder"
            raise UserError(what, path=path, key=KEY, fix="rename it, or name the file itself")
        with problems_of(str(path)):
            manager.load([str(path)])
        what = "its name is that of another task or group in the folder"
        raise UserError(what, path=path, key=KEY, fix="rename one of them, or move it out of the folder")


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Relative paths of data files are meant from the task's folder."""
    before = Path.cwd()
    with contextlib.chdir(folder):
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"names data that is neither in it nor elsewhere (looked for from {folder}, not from {before})",
                path=folder, key=KEY, fix="give data_files beside the YAML file, or by their whole path",
            ) from None  # fmt: skip


def whole(manager: Any, names: Sequence[str]) -> list[Any]:
    """The groups of these names, and the tasks, less what stands in one of the groups."""
    found: dict[str, Any] = {}
    inside: set[str] = set()
    for name in names:
        if name in inside:
            continue
        loaded = manager.load([name])
        groups = loaded["groups"]
        inside |= {child for group in groups.values() for child in group.child_names}
        found |= groups or loaded["tasks"]
    return [one for name, one in found.items() if name not in inside]


def check(tasks: Sequence[Any], model: str, length: int | None, shots: int | None, begins: bool) -> None:
    """UserError for what cannot be asked, or would be asked otherwise than told.

    Args:
        length: tokens that the model was made for; shots: of --shots; begins: whether its chat format can begin an
            answer for it.
    """
    for task in (leaf for one in tasks for leaf in leaves(one)):
        name, config = task.task_name, task.config
        if getattr(task, "UNSAFE_CODE", False):
            what = f"{name} runs code that the model writes, which `ft eval` does not do"
            raise UserError(what, key=KEY, fix="leave it out, or run lm_eval itself on what `ft merge` writes")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name} shows more than text", key=KEY, fix="leave it out")
        if config.gen_prefix and not begins:
            what = f"{name} begins the assistant's answer, which the chat format of {model} has no room for"
            raise UserError(what, key=KEY, fix="take gen_prefix out of it")
        if shots and config.num_fewshot == 0:
            what = f"{name} has num_fewshot: 0, with which the harness shows no examples"
            raise UserError(what, key="--shots", fix="leave it out, or num_fewshot out of the task")
        room = new_tokens(task)
        if length is not None and room is not None and room >= length:
            what = f"{name} lets {room} tokens be written, and {model} was made for {length}, the prompt included"
            raise UserError(what, key=KEY, fix="lower max_gen_toks in its generation_kwargs (256 where it has none)")
        count = (config.num_fewshot or 0) if shots is None else shots
        if count:
            apart(task)
            try:
                task.fewshot_context(next(iter(task.eval_docs)), count)
            except Exception as error:
                what, key = f"{name} cannot be asked with {count} examples: {why(error)}", "--shots"
                fix = "take fewer, or give the task more to draw from (fewshot_split)"
                raise UserError(what, key=KEY if shots is None else key, fix=fix) from error


def new_tokens(task: Any) -> int | None:
    """How many tokens a task lets the model write; None where it writes nothing."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.OUTPUT_TYPE != "generate_until":
        return None
    return int(normalize_gen_kwargs(task.config.generation_kwargs or {}, 256)["max_gen_toks"])


def apart(task: Any) -> None:
    """Examples that are drawn from what is asked never hold the question itself: the harness sees to that only where
    the task names the split that they come from."""
    drawn = task.has_training_docs() or task.has_validation_docs()
    shown = task.config.fewshot_config
    if not drawn and shown.split is None and shown.samples is None:
        shown.split = task.config.test_split
