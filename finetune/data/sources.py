"""Rows from wherever they are: files, folders, globs, shipped samples, hub datasets.

A folder (or pattern) whose files have names of splits is a dataset: its train split is what is trained.

A spec is a string, or a dict: path and, where they apply, name, split, revision, source (hub or modelscope), weight,
filter, max_samples, format, columns.
"""

from __future__ import annotations

import difflib
import glob
import importlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.data.nulls import without_nulls
from finetune.data.readers import SUFFIXES, EmptyFile, is_plain_text, read_file
from finetune.data.types import Row, RowProblem
from finetune.errors import UserError
from finetune.given_files import is_address, odd
from finetune.json_text import same
from finetune.recipe.sections import SourceConfig
from finetune.resources import resource_path

Spec = str | Path | dict[str, Any] | SourceConfig
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SKIPPED = {".md", ".py", ".sh", ".lock", ".html", ".png"}
# What a part of a path says about its rows, as the hub reads it; test before validation before train, so that
# train/test_2.jsonl is not trained.
SPLITS = {
    "test": re.compile(r"(?<![a-z])(test(ing)?|held[-_]?out|holdout)(set)?(?![a-z])|测试"),
    "validation": re.compile(r"(?<![a-z])(valid(ation)?|val|dev(elopment)?|eval(uation)?)(set)?(?![a-z])|验证"),
    "train": re.compile(r"(?<![a-z])train(ing)?(set)?(?![a-z])|训练"),
}


def read_rows(spec: Spec, *, streaming: bool = False, unit: str = "line", whole: bool = False) -> Iterator[Row]:
    """All rows of `spec`, lazily. UserError when it names nothing that exists, or only empty files.

    Args:
        unit: what of plain text is a document (`data.text_unit`).
        whole: with the empty cells of csv files and the nulls of tables.
    """
    spec = as_dict(spec)
    check_keys(spec)
    if spec.get("source") == "modelscope":
        files = modelscope_files(spec)
    elif is_hub(spec):
        yield from filtered(read_hub(spec, streaming, whole), spec.get("filter"))
        return
    else:
        files = files_of(spec["path"], spec.get("split"))
    empty = []
    for file in files:
        try:
            yield from filtered(read_file(file, unit, whole), spec.get("filter"))
        except EmptyFile as error:
            empty.append(error)
            if len(empty) == len(files):
                raise
    for missing in empty:
        problem = RowProblem("empty_file", "the file is empty", "take it out of the folder")
        yield Row({}, str(missing.problems[0].path), 1, problem)


def has_plain_text(spec: dict[str, Any]) -> bool:
    """Whether a local source holds files that are neither json nor tables; of a hub's nothing is known before."""
    if is_remote(spec):
        return not is_hub(spec)
    return any(map(is_plain_text, files_of(spec["path"], spec.get("split"))))


def check_keys(spec: dict[str, Any]) -> None:
    """UserError for keys of a source that would have no effect on what is read."""
    path, source = str(spec["path"]), spec.get("source")
    place = Path(path).expanduser()
    if source == "hub" and place.exists():
        what = "lies here, too, and would be read instead of the hub's dataset"
        raise UserError(what, path=path, key="source", fix="rename it or start elsewhere; or leave source out")
    is_local = path.startswith("builtin:") or glob.has_magic(path) or place.exists()
    unused = [] if source == "hub" else ["name"] if source == "modelscope" else ["revision"] if is_local else []
    if is_local and source != "modelscope" and not place.is_dir():
        unused += ["split", "name"] if path.startswith("builtin:") else ["name"]  # files may be those of several splits
    for key in unused:
        if spec.get(key):
            raise UserError("has no effect on this source", path=path, key=key, fix="leave it out")


def as_dict(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, SourceConfig):
        return spec.model_dump(exclude_none=True)
    return spec if isinstance(spec, dict) else {"path": str(spec)}


def as_dicts(specs: Spec | list[Any] | tuple[Any, ...]) -> list[dict[str, Any]]:
    return [as_dict(spec) for spec in (specs if isinstance(specs, list | tuple) else [specs])]


def is_remote(spec: dict[str, Any]) -> bool:
    return is_hub(spec) or spec.get("source") == "modelscope"


def local_files(specs: list[dict[str, Any]]) -> list[Path] | None:
    """None where one of the sources is remote."""
    if any(map(is_remote, specs)):
        return None
    return [file for spec in specs for file in files_of(spec["path"], spec.get("split"))]


def filtered(rows: Iterator[Row], wanted: dict[str, Any] | None) -> Iterator[Row]:
    """Rows whose columns have the wanted values ({column: value or list}); unreadable rows stay, to be reported."""
    if not wanted:
        yield from rows
        return
    sets = {column: value if isinstance(value, list) else [value] for column, value in wanted.items()}
    for row in rows:
        found = ((row.data.get(column), values) for column, values in sets.items())
        if row.problem is not None or all(any(same(value, v) for v in values) for value, values in found):
            yield row


def is_hub(spec: dict[str, Any]) -> bool:
    """A hub id: asked for by `source: hub` or a configuration, or a name like owner/name that is no local path."""
    path = str(spec["path"])
    if spec.get("source") is not None:
        return bool(spec["source"] == "hub")
    place = Path(path).expanduser()
    if spec.get("name") or spec.get("revision"):
        return True
    if spec.get("split"):
        return not (place.exists() or glob.has_magic(path) or path.startswith("builtin:"))
    exists = place.exists() or (place.parent.is_dir() and place.parent != Path())
    return HUB_ID.fullmatch(path) is not None and not exists and place.suffix.lower() not in SUFFIXES


def files_of(path: str | Path, split: str | None = None) -> list[Path]:
    """The files a path, folder, glob or `builtin:` name stands for, sorted; of a dataset those of `split`, or of its
    train split. UserError with the nearest name if none."""
    text = str(path)
    if not text.strip():  # a path without a name is the working directory
        raise UserError("names no file", fix="name one")
    groups = splits_in(text)
    if groups is not None:
        return readable(chosen(groups, split, text))
    if split is not None:
        raise UserError(f"one file has no split {split!r}", path=text, fix="name a folder, or leave `split` out")
    if text.startswith("builtin:"):
        return [builtin(text.removeprefix("builtin:"))]
    place = Path(text).expanduser()
    if place.is_file():
        return readable([place])
    if (strange := odd(place)) is not None:
        raise UserError(strange[0], path=text, fix=strange[1])
    if is_address(text):
        raise UserError(
            "is an address, and nothing is downloaded from one", path=text, fix="download it, and give the file"
        )
    names = [f.name for f in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    hint = "check the path (paths are relative to the working directory)"
    raise UserError("no such file", path=text, fix=f"did you mean {place.parent / near[0]}?" if near else hint)


def readable(files: list[Path]) -> list[Path]:
    """UserError for one that may not be read."""
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError("cannot be read: Permission denied", path=file, fix="check the file's permissions")
    return files


def splits_in(text: str) -> dict[str, list[Path]] | None:
    """The files of a folder or pattern by split, "" for those whose name says none; None for a single file."""
    root = root_of(text)
    if root is None:
        return None
    if root == Path(text).expanduser():
        if not os.access(root, os.R_OK | os.X_OK):
            raise UserError("cannot be read: Permission denied", path=text, fix="check the folder's permissions")
        files = data_files(root)
        if not files:
            raise UserError("the folder holds no data files", path=text, fix="name a file, or another folder")
    else:
        found = (Path(f) for f in glob.glob(str(Path(text).expanduser()), recursive=True))
        files = sorted({f for f in found if f.is_file()})  # with ** twice glob finds a file twice
        if not files:
            raise UserError("no file matches this pattern", path=text, fix="check data.train")
    groups: dict[str, list[Path]] = {}
    for file in files:
        where = str(file.relative_to(root)).lower()  # where the folder itself lies says nothing
        name = next((name for name, word in SPLITS.items() if word.search(where)), "")
        groups.setdefault(name, []).append(file)
    return groups


def root_of(text: str) -> Path | None:
    """The folder, or what stands before the first wildcard of a pattern; None for anything else."""
    place = Path(text).expanduser()
    if text.startswith("builtin:") or place.is_file():
        return None
    if place.is_dir():
        return place
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), place.parts))
    return Path(*fixed) if len(fixed) < len(place.parts) else None


def data_files(folder: Path) -> list[Path]:
    """What of a folder is data: not what hub downloads and save_to_disk write beside it."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix not in SKIPPED and not hidden(f, folder)]
    saved = {state.parent: listed_files(state) for state in folder.rglob("state.json")}
    files = sorted(f for f in files if f.name in (saved.get(f.parent) or [f.name]))
    return [f for f in files if f.suffix.lower() in SUFFIXES] or files


def hidden(file: Path, folder: Path) -> bool:
    """Names that begin with . or _ (and what hub downloads write beside the data) are no data."""
    own = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
    return file.name in own or any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def listed_files(state: Path) -> list[str]:
    """The files that datasets' save_to_disk says are the data; beside them lie caches of whoever worked with it."""
    try:
        return [str(entry["filename"]) for entry in json.loads(state.read_bytes())["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def chosen(groups: dict[str, list[Path]], split: str | None, path: str) -> list[Path]:
    """The files of a split. UserError when there are none."""
    if split is not None:
        root = root_of(path) or Path()
        every = sorted((f.relative_to(root), f) for files in groups.values() for f in files)
        wanted = next((name for name, word in SPLITS.items() if word.fullmatch(split.lower())), split)
        named = [f for at, f in every if split in at.parts or at.name.split(".")[0].split("-")[0] == split]
        if matching := named or groups.get(wanted):
            return matching
        have = ", ".join(sorted(filter(None, groups))) or "none"
        raise UserError(f"no split {split!r} (splits: {have})", path=path, fix="name one of them")
    if found := groups.get("train") or groups.get(""):
        return found
    if not Path(path).expanduser().is_dir():  # a pattern: asked for by name
        return sorted(file for files in groups.values() for file in files)
    what = f"no file to train on, only {' and '.join(sorted(groups))} data"
    raise UserError(what, path=path, fix="name the file itself")


def held_out(spec: Spec) -> dict[str, Any]:
    """The spec of held-out rows: of a dataset folder its validation split, or its test split, if it has one."""
    spec = as_dict(spec)
    if not spec.get("split") and not is_remote(spec):
        groups = splits_in(str(spec["path"])) or {}
        split = next((name for name in ("validation", "test") if name in groups), None)
        return {**spec, "split": split} if split else spec
    return spec


def left_out(listed: list[dict[str, Any]], offer: bool) -> list[str]:
    """A line for every source of which only a split is trained; `offer` says how to measure on the others."""
    lines = []
    for spec in listed:
        path = str(spec["path"])
        groups = None if spec.get("split") or is_remote(spec) else splits_in(path)
        if groups is None:
            continue
        used = chosen(groups, None, path)
        rest = {name: files for name, files in groups.items() if files != used and not set(files) <= set(used)}
        if not rest:
            continue
        names = [f"{name or 'other files'} ({', '.join(f.name for f in files[:3])}{', …' * (len(files) > 3)})"
                 for name, files in sorted(rest.items(), reverse=True)]  # fmt: skip
        fix = ""
        if offer and (held := rest.get("validation") or rest.get("test")):
            where = shlex.quote(str(held[0]) if len(held) == 1 else path)
            fix = f"; for figures on held-out rows: --set eval.data={where}"
        lines.append(f"{path}: trained without its {', '.join(names)}{fix}")
    return lines


def builtin(name: str) -> Path:
    """`tickets/train` -> data_templates/tickets_train.jsonl; every shipped sample has such a name."""
    stem = name.replace("/", "_")
    folder = resource_path("data_templates")
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix not in SKIPPED] if folder.is_dir() else []
    found = sorted(f for f in files if f.name.split(".")[0] == stem)
    if found:
        return found[0]
    names = sorted({f.name.split(".")[0] for f in files})
    near = difflib.get_close_matches(stem, names, n=1)
    fix = f"did you mean builtin:{near[0]}?" if near else f"there are: {', '.join(names)}"
    raise UserError("no such built-in data", path=f"builtin:{name}", fix=fix)


def read_hub(spec: dict[str, Any], streaming: bool, whole: bool = False) -> Iterator[Row]:
    """A dataset of the Hugging Face hub. UserError when it cannot be had."""
    import datasets

    path, split = str(spec["path"]), spec.get("split") or "train"
    label = f"{path}[{split}]"
    hub.unreachable()  # once, and then the cache: datasets would try for half a minute
    try:
        revision = spec.get("revision")
        rows = datasets.load_dataset(path, spec.get("name"), split=split, revision=revision, streaming=streaming)
    except Exception as error:  # datasets, the hub's client and the network each raise their own
        if hub.failed(error) or isinstance(error, ConnectionError):
            what, fix = hub.why(error)
        else:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            what, fix = f"the hub dataset cannot be loaded: {reason}", "check name, split and columns"
        raise UserError(what, path=label, fix=fix) from None
    for number, record in enumerate(rows, 1):
        yield Row(record if whole else without_nulls(record), label, number)


def modelscope_files(spec: dict[str, Any]) -> list[Path]:
    """A ModelScope dataset, downloaded by its own client. UserError when that is not installed."""
    path = str(spec["path"])
    try:
        client = importlib.import_module("modelscope.hub.snapshot_download")
    except ImportError:
        fix = "pip install modelscope, or download the files and give the folder"
        raise UserError("reading from ModelScope needs its client", path=path, fix=fix) from None
    try:
        folder = client.dataset_snapshot_download(path, revision=spec.get("revision") or "master")
    except Exception as error:  # the client raises many kinds
        what, fix = hub.why(error, "ModelScope")
        raise UserError(what, path=path, fix=fix) from None
    return files_of(folder, spec.get("split"))
