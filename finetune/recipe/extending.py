"""`extends: other.yaml`: a recipe that builds on another, one level deep.

Sections are merged key by key, values are replaced whole. The resolved recipe is complete and names no other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.recipe.overrides import forget_other_method, forget_other_reward, unset
from finetune.recipe.problems import KeyPath, Place
from finetune.recipe.reading import find, read
from finetune.recipe.stages import RECIPES

KEY = "extends"


def base_of(path: Path) -> Path | None:
    """The recipe that this one builds on: beside it, from here, or a shipped one by its name; None without."""
    values, lines = read(path)
    if KEY not in values:
        return None
    named, line = values[KEY], lines.get((KEY,))
    if not isinstance(named, str) or not named:
        fix = "write extends: other.yaml"
        raise UserError(f"{named!r} is not possible here", path=path, line=line, key=KEY, fix=fix)
    beside = path.parent / Path(named).expanduser()
    try:
        return beside if beside.is_file() else find(named)
    except UserError as error:
        (problem,) = error.problems
        raise UserError(f"no such recipe: {named}", path=path, line=line, key=KEY, fix=problem.fix) from None


def read_whole(path: Path) -> tuple[dict[str, Any], dict[KeyPath, Place]]:
    """`read`, with what the recipe builds on. Of a key that comes from there the place says so."""
    values, lines = read(path)
    base = base_of(path)
    if base is None:
        return values, dict(lines)
    below, their_lines = read(base)
    if KEY in below:
        what = f"{base} builds on another recipe itself, and one level is as deep as it goes"
        raise UserError(what, path=path, line=lines.get((KEY,)), key=KEY, fix="name that one, or write the rest here")
    own = {key: value for key, value in values.items() if key != KEY}
    return merged(below, own), {**{key: (base, line) for key, line in their_lines.items()}, **lines}


def merged(below: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A key that belongs to another adapter.method, or to another reward, than `own` asks for is left out."""
    found = dict(below)
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            found[name] = {**below[name], **value}
        elif value is not None or not isinstance(below.get(name), dict):  # an empty section says nothing
            found[name] = value
    said: set[KeyPath] = {
        (name, key) for name, section in own.items() if isinstance(section, dict) for key in section
    }  # fmt: skip
    section, kind = below.get("adapter"), RECIPES.get(str(found.get("stage")))
    usual = "lora" if kind is None else kind.model_fields["adapter"].default.method
    forget_other_method(found, section.get("method", usual) if isinstance(section, dict) else usual, said)
    forget_other_reward(found, said)
    unset(found, said)
    return found
