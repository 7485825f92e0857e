"""Recipe files: find, read, override, check and write them.

    load(reference, kind, overrides)    YAML + --set -> a checked recipe, or UserError with every problem at once
    shipped()                           the recipes that come with the package
    to_yaml(recipe)                     the resolved recipe as written into the run directory
    schema()                            JSON schema of all stages

Every problem names file, line, key and the fix; keys of other tools are recognised and translated.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, get_args, overload

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from finetune.errors import Problem, UserError
from finetune.recipe import effects
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.foreign_keys import foreign_name
from finetune.recipe.stages import RECIPES, R, Recipe
from finetune.resources import resource_path

KeyPath = tuple[str | int, ...]


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
    close = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean the shipped recipe {close[0]}?" if close else "`ft recipes list` shows the shipped recipes"
    raise UserError("no such recipe", path=reference, fix=hint)


LARGEST = 1 << 20  # bytes of a recipe file
MOST_NODES = 20_000  # of a recipe, every alias counted as what it stands for


def parse_value(text: str) -> Any:
    """One YAML value. yaml.YAMLError for anything it cannot be."""
    return _parsed(text)[1]


def _parsed(text: str) -> tuple[yaml.Node | None, Any]:
    """(the tree with its lines, the value). yaml.YAMLError, also for what is YAML but no recipe's value: an alias of
    itself, aliases that multiply without end, nesting too deep for a parser."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        _size(node, {})
        return node, yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.YAMLError:
        raise
    except (ValueError, OverflowError, TypeError) as error:  # dates and numbers that are none
        raise yaml.YAMLError(f"a value that cannot be read ({str(error).splitlines()[0]})") from None


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Nodes below and with this one, aliases written out; `known` holds -1 for a node that is being counted."""
    if node is None:
        return 0
    if (size := known.get(id(node), 0)) != 0:
        if size < 0:
            raise yaml.composer.ComposerError(None, None, "an alias stands inside what it names", node.start_mark)
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
            what = f"more than {MOST_NODES:,} values (aliases repeat what they name)"
            raise yaml.composer.ComposerError(None, None, what, part.start_mark)
    known[id(node)] = size
    return size


def recipe_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise UserError(f"is larger than {LARGEST >> 20} MiB: no recipe", path=path, fix="give a recipe file")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason})", path=path, fix="save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path, fix="check its permissions") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The YAML mapping and the line of each of its keys, counted from 1."""
    text = recipe_text(path)
    try:
        node, values = _parsed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"not readable as YAML: {what}", path=path, line=mark.line + 1 if mark else None,
            fix="check indentation, colons and quotes on this line",
        ) from None  # fmt: skip
    if not isinstance(values, dict):
        raise UserError("not a mapping of sections", path=path, fix="start with `version: 1` and `stage: sft`")
    if (odd := next((key for key in values if not isinstance(key, str)), None)) is not None:
        raise UserError(f"{odd!r} is no name of a section", path=path, fix="`ft recipes explain` lists all keys")
    lines: dict[KeyPath, int] = {}
    duplicates: list[Problem] = []

    def walk(node: yaml.Node | None, at: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, key.value)
                if here in lines:
                    line = key.start_mark.line + 1
                    duplicates.append(Problem("key stands twice", path, line=line, key=_dotted(here), fix="remove one"))
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


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _override(values: dict[str, Any], overrides: Sequence[str]) -> set[KeyPath]:
    """Apply `a.b=v` in place; returns the keys that were set (their problems name --set instead of a line)."""
    done: set[KeyPath] = set()
    for item in overrides:
        key, sign, text = item.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise UserError(f"--set {item}: not of the form key=value", fix="write e.g. --set train.max_steps=20")
        try:
            value = parse_value(text) if text else ""
        except yaml.YAMLError:
            value = text
        node = values
        for part in parts[:-1]:
            child = node.get(part)
            child = {} if child is None else child
            if not isinstance(child, dict):
                raise UserError(f"--set {item}: {part} is not a section", fix="`ft recipes schema` lists all keys")
            node[part] = node = dict(child)  # an alias of it elsewhere stays as it is
        node[parts[-1]] = value
        done.add(tuple(parts))
    return done


def _forget_other_method(values: dict[str, Any], before: Any, overridden: AbstractSet[KeyPath]) -> list[str]:
    """After `--set adapter.method=…`: take the keys of the recipe's own method out, in place; returns their names.

    A key stays where both methods have it with the same default: it means the same in both. Keys that were set
    themselves stay, too, and are checked as any other.
    """
    section = values.get("adapter")
    if not isinstance(section, dict) or ("adapter", "method") not in overridden:
        return []
    old, new = ADAPTERS.get(str(before)), ADAPTERS.get(str(section.get("method")))
    if old is None or new is None or old is new:
        return []
    a, b = old.model_fields, new.model_fields
    dropped = [
        key
        for key in section
        if key != "method" and ("adapter", key) not in overridden and key in a
        and not (key in b and a[key].default == b[key].default)
    ]  # fmt: skip
    for key in dropped:
        del section[key]
    return dropped


def _other_task(recipe: Recipe) -> bool:
    """The held-out rows are shipped ones, and the training data is the user's own."""
    given = recipe.data.train if isinstance(recipe.data.train, list) else [recipe.data.train]
    paths = [source if isinstance(source, str) else source.path for source in given]
    return str(recipe.eval.data).startswith("builtin:") and not any(path.startswith("builtin:") for path in paths)


REWARD_TRAINING = ("learning_rate", "num_train_epochs", "center_rewards_coefficient")


def _forget_other_reward(values: dict[str, Any], overridden: AbstractSet[KeyPath]) -> list[str]:
    """After `--set reward.model=…` or `reward.train=…` of ft ppo: take the recipe's own reward model out, in place,
    with the keys that would train it; returns their names. Keys that were set themselves stay.
    """
    section = values.get("reward")
    if values.get("stage") != "ppo" or not isinstance(section, dict):
        return []
    given = {name for name in ("model", "train") if section.get(name) is not None and ("reward", name) in overridden}
    other = {"model": "train", "train": "model"}[given.pop()] if len(given) == 1 else None
    dropped = [other] if other and section.get(other) is not None and ("reward", other) not in overridden else []
    if "train" in dropped or (("reward", "train") in overridden and section["train"] is None):
        dropped += [key for key in REWARD_TRAINING if key in section and ("reward", key) not in overridden]
    for key in dropped:
        del section[key]
    return dropped


def _unset(values: dict[str, Any], overridden: AbstractSet[KeyPath]) -> None:
    """`--set adapter.r=null` means the default, in place, where null is no value of the key itself."""
    kind = RECIPES.get(str(values.get("stage")))
    for path in overridden:
        node: Any = values
        classes: list[type[BaseModel]] = [] if kind is None else [kind]
        for part in path[:-1]:
            classes = [
                m for c in classes if part in c.model_fields for m in _models_in(c.model_fields[part].annotation)
            ]
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or path[-1] not in node or node[path[-1]] is not None:
            continue
        fields = [c.model_fields[path[-1]] for c in classes if path[-1] in c.model_fields]
        if fields and not any(type(None) in get_args(field.annotation) for field in fields):
            del node[path[-1]]


def _fields(stage: str) -> dict[str, set[str]]:
    """Section -> its keys (the union over adapter methods), for suggestions."""
    sections: dict[str, set[str]] = {"": set()}
    for name, field in RECIPES[stage].model_fields.items():
        sections[""].add(name)
        classes = _models_in(field.annotation)
        if classes:
            sections[name] = {key for model in classes for key in model.model_fields}
    return sections


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def suggest(key: str, section: str, stage: str) -> str:
    """What to write instead of an unknown key: another tool's name, another section, or the nearest spelling."""
    sections = _fields(stage)
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


def _explain(error: Any, stage: str) -> tuple[KeyPath, str, str | None]:
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
    message = error["msg"].removeprefix("Input should be ")
    return loc, f"{given!r} is not possible here", f"write {message}"


_TYPE_TAGS = {"str", "int", "float", "bool", "function-after", "constrained-int", "constrained-float", "dict", "list"}


def _placed(
    path: Path | None, lines: dict[KeyPath, int], overridden: AbstractSet[KeyPath]
) -> Callable[[KeyPath, str, str | None], Problem]:
    """A maker of problems that knows where each key stands: in a line of the file, or in --set."""

    def problem(key: KeyPath, message: str, fix: str | None) -> Problem:
        where: str | Path | None = path
        if path is not None and path.parent == resource_path("recipes"):
            where = f"shipped recipe {path.name}"  # where it is installed helps nobody
        from_set = any(key[: len(k)] == k or k[: len(key)] == key for k in overridden)
        at = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        if from_set:
            where, at = "--set", None
        return Problem(message, where, line=at, key=_dotted(key), fix=fix)

    return problem


def check(
    values: dict[str, Any],
    stage: str | None,
    path: Path | None = None,
    lines: dict[KeyPath, int] | None = None,
    overridden: AbstractSet[KeyPath] = frozenset(),
) -> Recipe:
    """Validate a mapping as the recipe of `stage`; UserError lists all problems."""
    problem = _placed(path, lines or {}, overridden)
    named = values.get("stage")
    if not isinstance(named, str) or named not in RECIPES:
        close = difflib.get_close_matches(str(named), list(RECIPES), n=1)
        fix = f"did you mean {close[0]}?" if close else f"write stage: {stage or 'sft'} (one of {', '.join(RECIPES)})"
        raise UserError(problem(("stage",), "missing" if named is None else f"unknown stage {named!r}", fix))
    if stage is not None and named != stage:
        message = f"this is a recipe for `ft {named}`, not `ft {stage}`"
        raise UserError(problem(("stage",), message, f"run ft {named} --recipe …"))
    if values.get("version") != 1:
        raise UserError(problem(("version",), f"version {values.get('version')!r} is not known", "write version: 1"))
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
            where, what, mend = _explain(item, named)
            found.setdefault(where, problem(where, what, mend))
        raise UserError(sorted(found.values(), key=lambda p: p.line or 0)) from None


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
    values, lines = _read(path)
    more = [] if output is None else [f"output.dir={json.dumps(output)}"]
    stage = next((name for name, cls in RECIPES.items() if cls is kind), None)
    return with_settings(values, stage, [*overrides, *more], path, lines, say)


def with_settings(
    values: dict[str, Any], stage: str | None, overrides: Sequence[str], path: Path | None = None,
    lines: dict[KeyPath, int] | None = None, say: Callable[[str], None] = lambda line: None,
) -> Any:  # fmt: skip
    """The recipe of a mapping with --set applied. UserError also for keys that would have no effect in it."""
    lines = lines or {}
    fields: dict[str, Any] = RECIPES[values["stage"]].model_fields if str(values.get("stage")) in RECIPES else {}
    usual = fields["adapter"].default.method if fields else "lora"
    section = values.get("adapter")
    before = section.get("method", usual) if isinstance(section, dict) else usual
    overridden = _override(values, overrides)
    if dropped := _forget_other_method(values, before, overridden):
        say(f"adapter.method={values['adapter']['method']}: left out {', '.join(dropped)}, which belong to {before}")
    if dropped := _forget_other_reward(values, overridden):
        say(f"left out reward.{', reward.'.join(dropped)} of the recipe, for another reward takes its place")
    _unset(values, overridden)
    recipe = check(values, stage, path, lines, overridden)
    if ("data", "train") in overridden and ("eval", "data") not in overridden and _other_task(recipe):
        say(f"eval.data is still {recipe.eval.data}: for rows like yours --set eval.data=FILE, or null and "
            "--set data.eval_split=0.05")  # fmt: skip
    problem = _placed(path, lines, overridden)
    found = [problem(as_path(key), why, fix) for key, why, fix in effects.refused(recipe)]
    if found:
        raise UserError(sorted(found, key=lambda p: p.line or 0))
    return recipe


def as_path(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def to_yaml(recipe: Recipe, header: str = "") -> str:
    """The recipe as it can be run again: keys that do nothing in it are left out."""
    values = effects.without(recipe.model_dump(mode="json", exclude_none=True), recipe)
    ordered = {"version": values.pop("version"), "stage": values.pop("stage"), **values}
    return header + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def schema() -> dict[str, Any]:
    """JSON schema for editors: any stage's recipe."""
    built = TypeAdapter(Recipe).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ft recipe", **built}
