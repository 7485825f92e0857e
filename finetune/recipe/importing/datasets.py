"""Which data another tool's config names: files, hub ids, and the names of LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.recipe.importing.source import AXOLOTL, LLAMA_FACTORY, SWIFT, TRL
from finetune.recipe.importing.tables import EYES

KEYS = {
    LLAMA_FACTORY: {"dataset", "dataset_dir", "eval_dataset"},
    AXOLOTL: {"datasets", "pretraining_dataset", "test_datasets"},
    SWIFT: {"dataset", "val_dataset", "use_hf", "columns"},
    TRL: {"dataset_name", "dataset_config", "dataset_config_name", "dataset_train_split", "dataset_test_split",
          "datasets"},
}  # fmt: skip
"""What is read here of each tool's keys."""
INFO = "dataset_info.json"
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
           "messages": "conversations", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
           "tools": "tools"}  # fmt: skip
"""LLaMA-Factory's name of a column -> that of our formats."""
OF_SWIFT = {"query": "instruction", "response": "output", "system": "system", "history": "history",
            "messages": "messages", "rejected_response": "rejected", "label": "label", "tools": "tools"}  # fmt: skip
"""ms-swift's name of a column -> that of our formats."""
TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
        "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
        "function_tag": ("function_call",), "system_tag": ("system",)}  # fmt: skip
"""What LLaMA-Factory's turns are called -> the names that are recognised here."""
INFO_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "subset", "split", "num_samples", "columns", "tags", "formatting",
             "ranking"}  # fmt: skip


def put(work: Any) -> None:
    keys = work.keys
    if work.source.tool == LLAMA_FACTORY:
        train = [one for name in names(keys.get("dataset")) for one in [registered(work, name)]]
        held = [registered(work, name) for name in names(keys.get("eval_dataset"))]
    elif work.source.tool == AXOLOTL:
        train = [entry(work, one) for one in listed(keys.get("datasets") or keys.get("pretraining_dataset"))]
        held = [entry(work, one) for one in listed(keys.get("test_datasets"))]
    elif work.source.tool == SWIFT:
        source = "hub" if keys.get("use_hf") else "modelscope"
        train = [of_swift(work, one, source) for one in listed(keys.get("dataset"))]
        held = [of_swift(work, one, source) for one in listed(keys.get("val_dataset"))]
        if not keys.get("use_hf") and "/" in str(keys.get("model", "")) and not Path(str(keys.get("model"))).exists():
            work.put("model.source", "modelscope", "model")
        columns = keys.get("columns") or {}
        if isinstance(columns, dict) and set(columns.values()) <= set(OF_SWIFT):
            columns = {OF_SWIFT[name]: here for here, name in columns.items() if OF_SWIFT[name] != here}
            if columns:
                work.put("data.columns", columns, "columns")
        else:
            work.leave("columns", columns, "write data.columns: {the format's name: your name}")
    else:
        one: dict[str, Any] = {"path": keys.get("dataset_name")}
        one |= {"name": keys.get("dataset_config") or keys.get("dataset_config_name")}
        one |= {"split": keys.get("dataset_train_split")}
        train, held = [one] if one["path"] else [entry(work, each) for each in listed(keys.get("datasets"))], []
        if keys.get("dataset_test_split"):
            what = "held-out rows are a file or a share of the training rows: set eval.data or data.eval_split"
            work.leave("dataset_test_split", keys["dataset_test_split"], what)
    if train:
        work.put("data.train", plain(train), "dataset")
    paths = [one["path"] for one in held if one.get("path")]
    for one in held:
        if more := {key: value for key, value in one.items() if key not in ("path", "source") and value}:
            work.leave(f"{one['path']}: {', '.join(more)}", list(more.values()), "eval.data takes a path or an id")
    if paths:
        work.put("eval.data", paths[0] if len(paths) == 1 else paths, "eval dataset")


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, "", True) else [value]


def names(value: Any) -> list[str]:
    return [name.strip() for one in listed(value) for name in str(one).split(",") if name.strip()]


def plain(entries: list[dict[str, Any]]) -> Any:
    """A path alone where nothing else is said of it."""
    kept = [{key: value for key, value in one.items() if value not in (None, {}, "")} for one in entries]
    short = [one["path"] if set(one) == {"path"} else one for one in kept]
    return short[0] if len(short) == 1 else short


def registered(work: Any, name: str) -> dict[str, Any]:
    """What dataset_info.json says of a name."""
    folder = str(work.keys.get("dataset_dir") or "data")
    places = [work.source.path.parent / folder, Path(folder), *(p / folder for p in work.source.path.parents)]
    found: dict[str, Any] | None = None
    place = Path(folder)
    for place in places:
        try:
            found = json.loads((place / INFO).read_text(encoding="utf-8")).get(name)
            break
        except (OSError, ValueError, AttributeError):
            continue
    if not isinstance(found, dict):
        if (Path(name)).exists() or (work.source.path.parent / name).exists():
            return {"path": name}
        work.notes.append(f"data: {name} is a name in {folder}/{INFO}, which is not here: write its path or hub id")
        return {"path": name}
    listed_columns, tags = found.get("columns") or {}, found.get("tags") or {}
    for key, value in listed_columns.items():
        if key not in COLUMNS:
            work.leave(f"{name}: columns.{key}", value, EYES if key in SEEN else "no column of that kind is read here")
    for key, value in tags.items():
        if value not in TAGS.get(key, ()):
            work.leave(f"{name}: tags.{key}", value, "turns are recognised by the names usual for them: rename them")
    for key in found.keys() - INFO_KEYS:
        work.leave(f"{name}: {key}", found[key], "datasets are files and hub ids here")
    columns = {COLUMNS[key]: value for key, value in listed_columns.items() if key in COLUMNS}
    columns = {ours: theirs for ours, theirs in columns.items() if ours != theirs and theirs != "messages"}
    about = {"columns": columns, "max_samples": found.get("num_samples"), "split": found.get("split")}
    for key, source in (("hf_hub_url", "hub"), ("ms_hub_url", "modelscope")):
        if found.get(key):
            return {"path": found[key], "source": source, "name": found.get("subset"), **about}
    return {"path": str(place / str(found.get("file_name"))), **{**about, "split": None}}


def entry(work: Any, one: Any) -> dict[str, Any]:
    """Of axolotl's list."""
    if not isinstance(one, dict):
        return {"path": str(one)}
    known = {"path", "split", "name", "revision", "type", "ds_type", "data_files", "shards", "field_messages"}
    found = {key: one.get(key) for key in ("path", "split", "name", "revision")}
    files = listed(one.get("data_files"))
    if files and one.get("path") in ("json", "csv", "text", "parquet"):
        found["path"] = files[0]
        for more in files[1:]:
            work.leave("datasets.data_files", more, "give one entry for each file")
    elif files:
        work.leave("datasets.data_files", files, "a hub dataset is read by configuration and split")
    if one.get("type"):
        work.leave("datasets.type", one["type"], "the row format is recognised; data.format names another")
    for key, value in one.items():
        if key in TRAINED:
            work.leave(f"datasets.{key}", value, "data.train_on says what is trained, the end of a turn with it")
        elif key not in known or key in ("shards", "field_messages"):
            work.leave(f"datasets.{key}", value, "rows are read as they stand; data.columns renames columns")
    return found


TRAINED = ("roles_to_train", "train_on_eos", "train_on_eot", "message_field_training", "message_field_training_detail")
SEEN = ("images", "videos", "audios")


def of_swift(work: Any, text: Any, source: str) -> dict[str, Any]:
    """HF::name:subset#number, MS::…, or a file."""
    match = re.fullmatch(r"(?:(HF|MS)::)?([^#]*?)(?::([^#:]+))?(?:#(\d+))?", str(text), re.I)
    if match is None:
        return {"path": str(text)}
    hub, path, subset, number = match.groups()
    if subset and "/" in subset:
        work.leave("dataset", text, "a subset each: give one entry for each of them")
        subset = subset.split("/")[0]
    local = path.endswith((".jsonl", ".json", ".csv", ".parquet", ".txt")) or Path(path).exists()
    where = {"hf": "hub", "ms": "modelscope"}.get((hub or "").lower(), source)
    return {
        "path": path, "source": None if local else where,
        "name": None if subset in (None, "default", "all") else subset,
        "max_samples": None if number is None else int(number),
    }  # fmt: skip
