"""Rows from wherever they are: files, folders, globs, shipped samples, hub datasets.

    read_rows(spec) -> Iterator[Row]        what cannot be read comes as a Row with `problem`, so that all are reported
    files_of(path) -> list[Path]            the local files a spec names

A spec is a string, or a dict: path and, where they apply, name, split, revision, source (hub or modelscope), weight,
filter, max_samples, format, columns.
"""

from __future__ import annotations

import difflib
import glob
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.readers import SUFFIXES, read_file, without_nulls
from finetune.data.types import Row
from finetune.errors import UserError
from finetune.recipe import SourceConfig, resource_path

Spec = str | Path | dict[str, Any] | SourceConfig
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SKIPPED = {".md", ".py", ".sh", ".lock", ".html", ".png"}


def read_rows(spec: Spec, *, streaming: bool = False) -> Iterator[Row]:
    """All rows of `spec`, lazily. UserError when it names nothing that exists."""
    spec = as_dict(spec)
    check_keys(spec)
    if spec.get("source") == "modelscope":
        files = modelscope_files(spec)
    elif is_hub(spec):
        yield from filtered(read_hub(spec, streaming), spec.get("filter"))
        return
    else:
        files = files_of(spec["path"])
    for file in files:
        yield from filtered(read_file(file), spec.get("filter"))


def check_keys(spec: dict[str, Any]) -> None:
    """UserError for keys of a source that would have no effect on what is read."""
    path, source = str(spec["path"]), spec.get("source")
    place = Path(path).expanduser()
    if source == "hub" and place.exists():
        what = "lies here, too, and would be read instead of the hub's dataset"
        raise UserError(what, path=path, key="source", fix="rename it or start elsewhere; or leave source out")
    is_local = path.startswith("builtin:") or glob.has_magic(path) or place.exists()
    unused = [] if source == "hub" else ["name"] if source == "modelscope" else ["revision"] if is_local else []
    if is_local and source != "modelscope" and not place.is_dir():  # a folder may hold several splits
        unused += ["split", "name"]
    for key in unused:
        if spec.get(key):
            raise UserError("has no effect on this source", path=path, key=key, fix="leave it out")


def as_dict(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, SourceConfig):
        return spec.model_dump(exclude_none=True)
    return spec if isinstance(spec, dict) else {"path": str(spec)}


def filtered(rows: Iterator[Row], wanted: dict[str, Any] | None) -> Iterator[Row]:
    """Rows whose columns have the wanted values ({column: value or list}); unreadable rows stay, to be reported."""
    if not wanted:
        yield from rows
        return
    sets = {column: value if isinstance(value, list) else [value] for column, value in wanted.items()}
    for row in rows:
        if row.problem is not None or all(row.data.get(column) in values for column, values in sets.items()):
            yield row


def is_hub(spec: dict[str, Any]) -> bool:
    """A hub id: asked for by `source: hub` or a split, or a name of the form owner/name that is no local path."""
    path = str(spec["path"])
    if spec.get("source") == "local":
        return False
    if spec.get("source") == "hub" or any(spec.get(key) for key in ("name", "split", "revision")):
        return True
    place = Path(path).expanduser()
    exists = place.exists() or (place.parent.is_dir() and place.parent != Path())
    return (
        bool(HUB_ID.fullmatch(path))
        and not exists
        and place.suffix.lower() not in SUFFIXES
        and not glob.has_magic(path)
    )


def files_of(path: str | Path) -> list[Path]:
    """The files a path, folder, glob or `builtin:` name stands for, sorted. UserError with the nearest name if none."""
    text = str(path)
    if text.startswith("builtin:"):
        return [builtin(text.removeprefix("builtin:"))]
    place = Path(text).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.is_file() and f.suffix not in SKIPPED and not hidden(f, place))
        if not files:
            raise UserError("the folder holds no data files", path=text, fix="name a file, or another folder")
        return files
    if glob.has_magic(text):
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
        if not files:
            raise UserError("no file matches this pattern", path=text, fix="check data.train")
        return files
    names = [f.name for f in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    hint = "check the path (paths are relative to the working directory)"
    raise UserError("no such file", path=text, fix=f"did you mean {place.parent / near[0]}?" if near else hint)


def hidden(file: Path, folder: Path) -> bool:
    """Names that begin with . or _ (and what hub downloads write beside the data) are no data."""
    own = {"dataset_info.json", "dataset_infos.json", "state.json"}
    return file.name in own or any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


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


def read_hub(spec: dict[str, Any], streaming: bool) -> Iterator[Row]:
    """A dataset of the Hugging Face hub. UserError when it cannot be had."""
    import datasets

    path, split = str(spec["path"]), spec.get("split") or "train"
    label = f"{path}[{split}]"
    try:
        rows = datasets.load_dataset(
            path, spec.get("name"), split=split, revision=spec.get("revision"), streaming=streaming
        )
    except Exception as error:  # datasets, the hub's client and the network each raise their own
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        fix = "check name, split and the network, or download it and give the folder"
        raise UserError(f"the hub dataset cannot be loaded: {reason}", path=label, fix=fix) from None
    for number, record in enumerate(rows, 1):
        yield Row(without_nulls(record), label, number)


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
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        fix = "check the id and the network, or download the files and give the folder"
        raise UserError(f"the ModelScope dataset cannot be loaded: {reason}", path=path, fix=fix) from None
    files = files_of(folder)
    split = spec.get("split")
    found = [f for f in files if split in f.stem] if split else files
    if not found:
        names = ", ".join(f.name for f in files[:10])
        raise UserError(f"no file of a split {split!r}", path=path, key="split", fix=f"there are {names}")
    return found
