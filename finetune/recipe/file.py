"""Recipe files: read, override, check and write them.

Every problem names file, line, key and the fix; keys of other tools are recognised and translated.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, overload

import yaml
from pydantic import TypeAdapter, ValidationError

from finetune.errors import Problem, UserError
from finetune.recipe import effects
from finetune.recipe.extending import read_whole
from finetune.recipe.foreign_keys import foreign_name
from finetune.recipe.overrides import forget_other_method, forget_other_reward, override, unset
from finetune.recipe.problems import KeyPath, Place, as_path, explain, fields_of, placed
from finetune.recipe.reading import find
from finetune.recipe.reference import EXTENDS
from finetune.recipe.sections import as_list
from finetune.recipe.stages import RECIPES, R, Recipe


def check(
    values: dict[str, Any], stage: str | None, path: Path | None = None, lines: Mapping[KeyPath, Place] | None = None,
    overridden: AbstractSet[KeyPath] = frozenset(),
) -> Recipe:  # fmt: skip
    """Validate a mapping as the recipe of `stage`; UserError lists all problems."""
    problem = placed(path, lines or {}, overridden)
    named = values.get("stage")
    if not isinstance(named, str) or named not in RECIPES:
        close = difflib.get_close_matches(str(named), list(RECIPES), n=1)
        fix = f"did you mean {close[0]}?" if close else f"write stage: {stage or 'sft'} (one of {', '.join(RECIPES)})"
        what = "missing" if named is None else f"unknown stage {named!r}"
        raise UserError([problem(("stage",), what, fix), *others(values, stage or "sft", problem)])
    if stage is not None and named != stage:
        message = f"this is a recipe for `ft {named}`, not `ft {stage}`"
        raise UserError(problem(("stage",), message, f"run ft {named} --recipe …"))
    if values.get("version") != 1:
        what = f"version {values['version']!r} is not known" if values.get("version") is not None else "missing"
        raise UserError([problem(("version",), what, "write version: 1"), *others(values, named, problem)])
    # A section left empty in YAML is None and means its defaults.
    fields: dict[str, Any] = RECIPES[named].model_fields
    values = {k: ({} if v is None and k in fields and k not in ("model", "output") else v) for k, v in values.items()}
    if isinstance(values.get("adapter"), dict):
        values["adapter"] = {"method": fields["adapter"].default.method, **values["adapter"]}
    try:
        return RECIPES[named].model_validate(values)
    except ValidationError as error:
        found: dict[KeyPath, Problem] = {}
        for item in error.errors():
            where, what, mend = explain(item, named)
            found.setdefault(where, problem(where, what, mend))
        raise UserError(sorted(found.values(), key=lambda p: p.line or 0)) from None


def others(values: dict[str, Any], stage: str, problem: Callable[[KeyPath, str, str | None], Problem]) -> list[Problem]:
    """The keys at the top level of another tool's config, each with what it is called here."""
    known = {f"{section}.{key}" if section else key for section, keys in fields_of(stage).items() for key in keys}
    told = {key: foreign_name(key, known) for key in values if key not in RECIPES[stage].model_fields}
    return [problem((key,), "unknown key", fix) for key, fix in told.items() if fix is not None]


@overload
def load(
    reference: str, kind: type[R], overrides: Sequence[str] = (), output: str | None = None,
    say: Callable[[str], None] = ...,
) -> R: ...  # fmt: skip
@overload
def load(
    reference: str, kind: None, overrides: Sequence[str] = (), output: str | None = None,
    say: Callable[[str], None] = ...,
) -> Recipe: ...  # fmt: skip
def load(
    reference: str, kind: Any, overrides: Sequence[str] = (), output: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Any:  # fmt: skip
    """Read a recipe by path or shipped name as a `kind` of recipe (None: of any stage), apply --set and --output, and
    check it.

    Args:
        say: told what was left out of the file because of an override.
    """
    path = find(reference)
    more = [] if output is None else [f"output.dir={json.dumps(output)}"]
    stage = next((name for name, cls in RECIPES.items() if cls is kind), None)
    values, lines = read_whole(path)
    return with_settings(values, stage, [*overrides, *more], path, lines, say)


def with_settings(
    values: dict[str, Any], stage: str | None, overrides: Sequence[str], path: Path | None = None,
    lines: Mapping[KeyPath, Place] | None = None, say: Callable[[str], None] = lambda line: None,
) -> Any:  # fmt: skip
    """The recipe of a mapping with --set applied. UserError also for keys that would have no effect in it."""
    lines = lines or {}
    fields: dict[str, Any] = RECIPES[values["stage"]].model_fields if str(values.get("stage")) in RECIPES else {}
    usual = fields["adapter"].default.method if fields else "lora"
    section = values.get("adapter")
    before = section.get("method", usual) if isinstance(section, dict) else usual
    overridden = override(values, overrides)
    if dropped := forget_other_method(values, before, overridden):
        say(f"adapter.method={values['adapter']['method']}: left out {', '.join(dropped)}, which belong to {before}")
    if dropped := forget_other_reward(values, overridden):
        say(f"left out reward.{', reward.'.join(dropped)} of the recipe, for another reward takes its place")
    unset(values, overridden)
    recipe = check(values, stage, path, lines, overridden)
    if ("data", "train") in overridden and ("eval", "data") not in overridden and _other_task(recipe):
        still = ", ".join(recipe.eval.paths or ())
        say(f"eval.data is still {still}: for rows like yours --set eval.data=FILE, or null and "
            "--set data.eval_split=0.05")  # fmt: skip
    problem = placed(path, lines, overridden)
    if found := [problem(as_path(key), why, fix) for key, why, fix in effects.refused(recipe)]:
        raise UserError(sorted(found, key=lambda p: p.line or 0))
    return recipe


def _other_task(recipe: Recipe) -> bool:
    """The held-out rows are shipped ones, and the training data is the user's own."""
    paths = [source if isinstance(source, str) else source.path for source in as_list(recipe.data.train)]
    held = recipe.eval.paths or [""]
    return held[0].startswith("builtin:") and not any(path.startswith("builtin:") for path in paths)


def to_yaml(recipe: Recipe, header: str = "") -> str:
    """The recipe as it can be run again: keys that do nothing in it are left out."""
    values = effects.without(recipe.model_dump(mode="json", exclude_none=True), recipe)
    ordered = {"version": values.pop("version"), "stage": values.pop("stage"), **values}
    return header + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


SECTION = "Of this section only what differs from the recipe that is built on."


def schema() -> dict[str, Any]:
    """JSON schema for editors: any stage's recipe, or one that builds on another and may leave out what that says."""
    built = TypeAdapter(Recipe).json_schema()
    sections = {
        name: {"type": ["object", "null"], "description": SECTION}
        for kind in RECIPES.values()
        for name in kind.model_fields
    }
    about = {"type": "string", "description": EXTENDS}
    head = {
        "extends": about,
        "version": {"const": 1, "description": "Version of the recipe format."},
        "stage": {"enum": list(RECIPES), "description": "The command that runs this recipe."},
    }
    extending = {"type": "object", "required": ["extends"], "additionalProperties": False}
    built["$defs"]["Extending"] = {**extending, "properties": {**sections, **head}}
    built["anyOf"].append({"$ref": "#/$defs/Extending"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ft recipe", **built}
