"""What is wrong with a recipe, told with its place (a line, or --set), its key and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from finetune.errors import Problem
from finetune.recipe.foreign_keys import foreign_name
from finetune.recipe.stages import RECIPES
from finetune.resources import resource_path

KeyPath = tuple[str | int, ...]
Place = int | tuple[Path, int]
"""A line of the recipe's own file, or of the one that it builds on."""
_TYPE_TAGS = {
    "str", "int", "float", "bool", "function-after", "constrained-int", "constrained-float", "constrained-str", "dict",
    "list", "SourceConfig",
}  # fmt: skip


def suggest(key: str, section: str, stage: str) -> str:
    """What to write instead of an unknown key: another tool's name, another section, or the nearest spelling."""
    sections = fields_of(stage)
    if section == "adapter" and key in sections[section]:  # which holds the keys of all methods
        return "it belongs to another adapter.method: leave it out"
    known = {f"{s}.{k}" if s else k for s, keys in sections.items() for k in keys}
    if (foreign := foreign_name(key, known)) is not None:
        return foreign
    elsewhere = [s for s, keys in sections.items() if key in keys and s != section]
    if elsewhere:
        return f"it belongs into {elsewhere[0]}: {elsewhere[0]}.{key}" if elsewhere[0] else "move it to the top level"
    close = difflib.get_close_matches(key, sorted(sections.get(section, sections[""])), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    close = difflib.get_close_matches(key, sorted(k.rpartition(".")[2] for k in known), n=1, cutoff=0.75)
    if close:
        return f"did you mean {next(k for k in sorted(known) if k.endswith(close[0]))}?"
    return "`ft recipes schema` lists all keys"


def explain(error: Any, stage: str) -> tuple[KeyPath, str, str | None]:
    """(key path, message, fix) of one pydantic error; union tags such as adapter.lora are left out of the path."""
    loc: KeyPath = error["loc"]
    if len(loc) > 2 and loc[0] == "adapter":
        loc = (loc[0], *loc[2:])
    loc = tuple(part for part in loc if not (isinstance(part, str) and ("[" in part or part in _TYPE_TAGS)))
    kind, context, given = error["type"], error.get("ctx", {}), error.get("input")
    section = str(loc[0]) if len(loc) > 1 else ""
    if kind == "extra_forbidden":
        return loc, "unknown key", suggest(str(loc[-1]), section, stage)
    if kind == "missing":
        return loc, "missing", "add it" if loc != ("output",) else "add output: {dir: runs/name} or use --output DIR"
    if kind == "invalid_key":
        return loc[:-1], f"{given!r} is no name of a key", "`ft recipes schema` lists all keys"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", context["expected"]), n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {context['expected']}"
        return loc, f"{given!r} is not possible here", hint
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = context.get("expected_tags", "")
        return (*loc, "method"), f"unknown adapter method {context.get('tag', '(none)')!r}", f"one of {expected}"
    if kind == "value_error":
        key, _, message = str(context["error"]).partition(": ")
        return tuple(key.split(".")), message, None
    return loc, f"{given!r} is not possible here", f"write {wanted(error, loc)}"


WANTED = {
    "model_type": "a mapping", "dict_type": "a mapping", "list_type": "a list: [a, b]", "string_type": "text",
    "bool_type": "true or false", "int_type": "a whole number", "float_type": "a number",
    "string_too_short": "a name or a path", "too_short": "at least one",
}  # fmt: skip
"""pydantic's type of error -> what is wanted."""


def wanted(error: Any, loc: KeyPath) -> str:
    kind, given = error["type"], error.get("input")
    said: str = WANTED.get(kind) or error["msg"].removeprefix("Input should be ")
    if (
        kind in ("int_type", "float_type")
        and isinstance(given, str)
        and re.fullmatch(r"\s*[-+]?[\d.]+([eE][-+]?\d+)?\s*", given)
    ):
        return f"{said}, without quotes"
    if kind == "model_type" and loc:
        return f"{said}: {loc[-1]}: {{key: value}}"
    return f"a number {said}" if kind.startswith(("greater_than", "less_than")) else said


def placed(
    path: Path | None, lines: Mapping[KeyPath, Place], overridden: AbstractSet[KeyPath]
) -> Callable[[KeyPath, str, str | None], Problem]:
    """A maker of problems that knows where each key stands: in a line of the file, or in --set."""

    def problem(key: KeyPath, message: str, fix: str | None) -> Problem:
        from_set = any(key[: len(k)] == k or k[: len(key)] == key for k in overridden)
        at = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        file, at = at if isinstance(at, tuple) else (path, at)
        where: str | Path | None = file
        if file is not None and file.parent == resource_path("recipes"):
            where = f"shipped recipe {file.name}"  # where it is installed helps nobody
        if from_set:
            where, at = "--set", None
        return Problem(message, where, line=at, key=dotted(key), fix=fix)

    return problem


def fields_of(stage: str) -> dict[str, set[str]]:
    """Section -> its keys (the union over adapter methods), for suggestions."""
    sections: dict[str, set[str]] = {"": set()}
    for name, field in RECIPES[stage].model_fields.items():
        sections[""].add(name)
        classes = models_in(field.annotation)
        if classes:
            sections[name] = {key for model in classes for key in model.model_fields}
    return sections


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def as_path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))
