"""What the shell offers at the Tab key: shipped recipes, runs, keys of `--set` with their values, built-in bases.

Read from files alone (the recipes' JSON schema, folders), so that an answer takes a fraction of a second.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.resources import BUILTIN_MODELS, resource_path

ASKED = "_FT_COMPLETE"
"""What the shell's script sets, to `complete_bash` and the like."""
STAGES = ("pretrain", "sft", "reward", "dpo", "kto", "ppo")
RUN_FILES = ("recipe.yaml", "adapter_config.json")
DEEP = 3
"""Levels below a folder in which runs are looked for."""
LOOKS = 1000
"""Folders that are looked into for runs."""
SPECIAL = re.compile(r"""[\s"'\\$&;()|<>*?`!#\[\]]""")
"""To a shell; bash puts in what it is given as it is, the others quote it."""


def answer(app: Callable[..., Any]) -> None:
    """Print what the shell asks for, and end."""
    bash = os.environ[ASKED] == "complete_bash"
    kept = rejoined() if bash else ""
    # Whatever is wrong: an error in the middle of a line that is being typed helps nobody.
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit, Exception):
        app(args=[], prog_name="ft")
    for line in filter(None, said.getvalue().splitlines()):
        print(SPECIAL.sub(r"\\\g<0>", line.removeprefix(kept)) if bash else line)
    sys.exit(0)


def rejoined() -> str:
    """bash cuts `--set a.b=v` in three words: here they are one again. Returns what bash keeps of the word at hand: it
    replaces only what stands behind the sign."""
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0"))
    kept = ""
    while "=" in words[2:]:
        sign = words.index("=", 2)
        words[sign - 1 : sign + 2] = ["".join(words[sign - 1 : sign + 2])]
        if at in (sign, sign + 1):
            at = sign - 1
            kept = words[at].partition("=")[0] + "="
        elif at > sign:
            at -= 2
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(words), str(at)
    return kept


# --- recipes, runs, files ---


def recipes(ctx: Any, incomplete: str) -> list[str]:
    """Shipped recipes (of the command's stage), and recipe files of the folder."""
    stage = ctx.info_name if ctx.info_name in STAGES else None
    folder = resource_path("recipes")
    shipped = [
        path.name for path in sorted(folder.glob("*.yaml"))
        if path.name.startswith(incomplete) and (stage is None or f"\nstage: {stage}\n" in path.read_text("utf-8"))
    ]  # fmt: skip
    return [*shipped, *files(incomplete, (".yaml", ".yml"))]


def shipped_names(ctx: Any, incomplete: str) -> list[str]:
    return [path.name for path in sorted(resource_path("recipes").glob("*.yaml")) if path.name.startswith(incomplete)]


def files(incomplete: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Files with these endings, and folders to look into."""
    found = []
    for path, shown in entries(incomplete):
        if path.is_dir():
            found.append(f"{shown}/")
        elif path.name.lower().endswith(endings):
            found.append(shown)
    if len(found) == 1 and found[0].endswith("/"):  # a shell puts a space behind a word that stands alone
        found += [one for one in files(found[0], endings) if one != found[0]]
    return found


def entries(incomplete: str) -> Iterator[tuple[Path, str]]:
    """(path, as it is typed) of what a folder holds and what was typed begins."""
    head, slash, tail = incomplete.rpartition("/")
    place = Path(f"{head}{slash}" or ".").expanduser()
    try:
        listed = sorted(place.iterdir())
    except OSError:
        return
    for path in listed:
        if path.name.startswith(tail) and (tail.startswith(".") or not path.name.startswith(".")):
            yield path, f"{head}{slash}{path.name}"


def runs(ctx: Any, incomplete: str) -> list[str]:
    """Runs and adapters below what was typed, near ones first; without anything typed those of the folder."""
    found: list[str] = []
    ahead = deque((path, shown, DEEP) for path, shown in entries(incomplete) if path.is_dir())
    for _ in range(LOOKS):  # a home with all its projects is not gone through
        if not ahead:
            break
        path, shown, deep = ahead.popleft()
        if any((path / name).is_file() for name in RUN_FILES):
            found.append(shown)
        elif deep:
            ahead += [(path / name, f"{shown}/{name}", deep - 1) for name in folders_in(path)]
    return found


def folders_in(path: Path) -> list[str]:
    try:
        with os.scandir(path) as inside:
            return sorted(one.name for one in inside if not one.name.startswith(".") and one.is_dir())
    except OSError:
        return []


def runs_or_folders(ctx: Any, incomplete: str) -> list[str]:
    found = runs(ctx, incomplete)
    return [*found, *(name for name in files(incomplete, ("\0",)) if name.rstrip("/") not in found)]


def bases(ctx: Any, incomplete: str) -> list[str]:
    """Built-in bases, GGUF files, folders."""
    built_in = sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/config.json"))
    return [*(name for name in built_in if name.startswith(incomplete)), *files(incomplete, (".gguf",))]


def answering(ctx: Any, incomplete: str) -> list[str]:
    found = runs(ctx, incomplete)
    return [*found, *(name for name in bases(ctx, incomplete) if name.rstrip("/") not in found)]


def data(ctx: Any, incomplete: str) -> list[str]:
    """The rows that come along, and files."""
    folder = resource_path("data_templates")
    kinds = (".json", ".jsonl", ".csv", ".tsv", ".txt")
    names = sorted(path.stem for path in folder.iterdir() if path.suffix in kinds)
    shipped = [f"builtin:{name.replace('_', '/', 1) if name.startswith('tickets_') else name}" for name in names]
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gz", ".zst")
    return [*(name for name in shipped if name.startswith(incomplete)), *files(incomplete, endings)]


def recipes_or_data(ctx: Any, incomplete: str) -> list[str]:
    return list(dict.fromkeys([*recipes(ctx, incomplete), *data(ctx, incomplete)]))


# --- keys ---


def keys(stage: str | None) -> dict[str, tuple[list[str], Any]]:
    """Key of a recipe -> (the values it can have, where they are few; its default)."""
    schema = json.loads(resource_path("recipes", "ft-recipe.schema.json").read_text(encoding="utf-8"))
    found: dict[str, tuple[list[str], Any]] = {}
    for kind in STAGES if stage is None else (stage,):
        walk(schema["$defs"][f"{kind.capitalize()}Recipe"], schema["$defs"], "", found)
    return found


def walk(
    section: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, found: dict[str, tuple[list[str], Any]]
) -> None:
    for name, prop in section.get("properties", {}).items():
        parts = list(alternatives(prop, defs))
        sections = [part for part in parts if "properties" in part]
        for part in sections:
            walk(part, defs, f"{prefix}{name}.", found)
        if len(sections) < len(parts):
            choices = [one for part in parts for one in values_of(part)]
            before, default = found.get(f"{prefix}{name}", ([], None))
            found[f"{prefix}{name}"] = (list(dict.fromkeys([*before, *choices])), prop.get("default", default))


def alternatives(prop: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "$ref" in prop:
        yield from alternatives(defs[prop["$ref"].rpartition("/")[2]], defs)
        return
    within = [part for name in ("anyOf", "oneOf", "allOf") for part in prop.get(name, ())]
    for part in within:
        yield from alternatives(part, defs)
    if not within and prop.get("type") != "null":
        yield prop


def values_of(part: Mapping[str, Any]) -> list[str]:
    if part.get("type") == "boolean":
        return ["true", "false"]
    listed = part["enum"] if "enum" in part else [part["const"]] if "const" in part else []
    return [str(one) for one in listed]


def settings(ctx: Any, incomplete: str) -> list[str]:
    """Of `--set`: keys of the stage, and behind the sign what such a key can be."""
    known = keys(ctx.info_name if ctx.info_name in STAGES else None)
    name, sign, value = incomplete.partition("=")
    if sign:
        choices, _ = known.get(name, ([], None))
        if name == "model.name":
            choices = bases(ctx, value)
        elif name in ("data.train", "eval.data"):
            choices = data(ctx, value)
        return [f"{name}={one}" for one in choices if one.startswith(value)]
    begun = [key for key in known if key.startswith(name)]
    if len(begun) > 1 and not name.endswith("."):  # section by section, as folders are
        rest = {key[: key.find(".", len(name)) + 1] if "." in key[len(name) :] else f"{key}=" for key in begun}
        if len(rest) > 1:
            return sorted(rest)
        begun = [key for key in known if key.startswith(next(iter(rest)))]
    if len(begun) == 1:  # with values: a shell puts a space behind a word that stands alone
        choices, default = known[begun[0]]
        shown = choices or ([] if default in (None, "", [], {}) else [str(default)])
        return [f"{begun[0]}=", *(f"{begun[0]}={one}" for one in shown)]
    return [f"{key}=" for key in begun]


def key_names(ctx: Any, incomplete: str) -> list[str]:
    everything = keys(None)
    sections = dict.fromkeys(key.partition(".")[0] for key in everything)
    return [name for name in [*sections, *everything] if name.startswith(incomplete)]


def listed(*names: str) -> Callable[[Any, str], list[str]]:
    """One of these; of several with commas the last."""

    def offered(ctx: Any, incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return offered


QUANTIZED = listed("none", "int8", "int4")


def methods(ctx: Any, incomplete: str) -> list[str]:
    choices, _ = keys("sft")["adapter.method"]
    return listed(*choices)(ctx, incomplete)
