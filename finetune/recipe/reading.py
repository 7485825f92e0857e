"""Where a recipe's text is found, and its YAML with the line of every key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import Problem, UserError
from finetune.given_files import odd
from finetune.json_text import reason
from finetune.recipe.problems import KeyPath, dotted
from finetune.resources import resource_path

LARGEST = 1 << 20  # bytes of a recipe file
MOST_NODES = 20_000  # of a recipe, every alias counted as what it stands for


class NotPlain(yaml.MarkedYAMLError):
    """Aliases that are YAML and cannot be a recipe's."""

    def __init__(self, problem: str, at: yaml.Mark, fix: str) -> None:
        super().__init__(problem=problem, problem_mark=at)
        self.fix = fix


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers: PyYAML reads `2e-4` as text, which every learning rate is written as."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def shipped() -> dict[str, Path]:
    """Name -> path of the shipped recipes, sorted by name."""
    return {path.name: path for path in sorted(resource_path("recipes").rglob("*.yaml"))}


def find(reference: str) -> Path:
    """A path, or the name of a shipped recipe with or without .yaml; an existing path wins."""
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    names = shipped()
    name = reference if reference.endswith((".yaml", ".yml")) else reference + ".yaml"
    if name in names:
        return names[name]
    if (strange := ("is a folder", "give the recipe in it") if path.is_dir() else odd(path)) is not None:
        raise UserError(strange[0], path=reference, fix=strange[1])
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean the shipped recipe {close[0]}?" if close else "`ft recipes list` shows the shipped recipes"
    raise UserError("no such recipe", path=reference, fix=hint)


def parse_value(text: str) -> Any:
    """One YAML value. yaml.YAMLError for anything it cannot be."""
    return _parsed(text)[1]


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """(the tree with its lines, the value). yaml.YAMLError, also for what is YAML but no recipe's value: an alias of
    itself, aliases that multiply without end, nesting too deep for a parser."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _size(node, {})
        return node, None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.YAMLError:
        raise
    except (ValueError, OverflowError, TypeError) as error:  # dates and numbers that are none
        raise yaml.YAMLError(f"a value that cannot be read ({reason(error)})") from None


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Nodes below and with this one, aliases written out; `known` holds -1 for a node that is being counted."""
    if node is None:
        return 0
    if (size := known.get(id(node), 0)) != 0:
        if size < 0:
            what, fix = "an alias stands inside what it names", "write the values out in its place"
            raise NotPlain(what, node.start_mark, fix)
        return size
    known[id(node)] = -1
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    size = 1
    for part in parts:
        size += _size(part, known)
        if size > MOST_NODES:
            what = f"more than {MOST_NODES:,} values, as every alias (*name) repeats all that it names"
            raise NotPlain(what, part.start_mark, "use fewer aliases, or write out the values that are needed")
    known[id(node)] = size
    return size


def recipe_text(path: Path) -> str:
    """UserError for what is no file of text."""
    if (found := odd(path)) is not None:
        raise UserError(found[0], path=path, fix=found[1])
    if path.is_dir():
        raise UserError("is a folder", path=path, fix="give a file in it")
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"is larger than {LARGEST >> 20} MiB: no recipe", path=path, fix="give a recipe file")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason})", path=path, fix="save the file as UTF-8") from None
    except FileNotFoundError:
        raise UserError("no such file", path=path, fix="check its name, and the folder it is looked for in") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path, fix="check its permissions") from None


def read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The YAML mapping and the line of each of its keys, counted from 1."""
    text = recipe_text(path)
    try:
        node, values = _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"not readable as YAML: {what}", path=path, line=mark.line + 1 if mark else None,
            fix=error.fix if isinstance(error, NotPlain) else "check indentation, colons and quotes on this line",
        ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise UserError("not a mapping of sections", path=path, fix="start with `version: 1` and `stage: sft`")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{strange[0]!r} is no name of a section", path=path, fix="`ft recipes explain` lists all keys")
    lines: dict[KeyPath, int] = {}
    duplicates: list[Problem] = []

    def walk(node: yaml.Node | None, at: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, key.value)
                if here in lines:
                    line = key.start_mark.line + 1
                    duplicates.append(Problem("key stands twice", path, line=line, key=dotted(here), fix="remove one"))
                lines[here] = key.start_mark.line + 1
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, index)] = value.start_mark.line + 1
                walk(value, (*at, index))

    walk(node, ())
    if duplicates:
        raise UserError(duplicates)
    return values, lines
