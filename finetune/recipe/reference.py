"""The recipe's keys for people, out of the same classes that check recipes.

Values, limits and defaults come from the JSON schema, the words from the docstrings in `recipe`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import UserError
from finetune.language import translated
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.foreign_keys import foreign_name
from finetune.recipe.stages import RECIPES

REQUIRED = object()
EXTENDS = (
    "A recipe that this one builds on: a file beside it, or a shipped recipe's name. Its sections are merged with "
    "these key by key; values are replaced whole. One level deep."
)
ORDER = (
    "version",
    "stage",
    "extends",
    "model",
    "data",
    "adapter",
    "train",
    "eval",
    "dpo",
    "kto",
    "reward",
    "ppo",
    "output",
)


@dataclass
class Key:
    """One key with one meaning; a key whose default differs between stages or methods is several of these."""

    name: str
    values: str
    default: Any
    description: str
    stages: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    """adapter.method of which it is a key; empty outside the adapter section."""

    @property
    def shown_default(self) -> str:
        if self.default is REQUIRED:
            return "must be given"
        if self.default is None:
            return "unset"
        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    @property
    def scope(self) -> str:
        """Where it applies, if not everywhere: `pretrain`, `method lora, vera`."""
        parts = [f"method {', '.join(self.methods)}"] if self.methods and set(self.methods) != set(ADAPTERS) else []
        parts += [f"stage {', '.join(self.stages)}"] if set(self.stages) != set(RECIPES) else []
        return "; ".join(parts)


def keys() -> list[Key]:
    """All keys, sections in the order of ORDER."""
    found: dict[tuple[Any, ...], Key] = {}
    for stage, kind in RECIPES.items():
        schema = kind.model_json_schema()
        for name, values, default, description, method in _walk(schema, schema.get("$defs", {}), "", None):
            if name == "stage":
                values = " | ".join(RECIPES)
            same = (name, values, repr(default), description)
            key = found.setdefault(same, Key(name, values, default, description))
            if stage not in key.stages:
                key.stages.append(stage)
            if method is not None and method not in key.methods:
                key.methods.append(method)
    found["extends",] = Key("extends", "recipe file", None, EXTENDS, list(RECIPES))
    names = list(dict.fromkeys(key.name for key in found.values()))  # keys of one name stand together
    return sorted(found.values(), key=lambda key: (ORDER.index(key.name.partition(".")[0]), names.index(key.name)))


def _walk(
    schema: dict[str, Any], defs: dict[str, Any], prefix: str, method: str | None
) -> Iterator[tuple[str, str, Any, str, str | None]]:
    required = set(schema.get("required", ()))
    for name, prop in schema.get("properties", {}).items():
        key = f"{prefix}{name}"
        sections = [defs[ref.rpartition("/")[2]] for ref in _references(prop)]
        if key == "adapter":
            for section in sections:
                yield from _walk(section, defs, "adapter.", section["properties"]["method"]["const"])
            continue
        whole = [s for s in sections if "properties" in s]
        if not whole or prefix:
            default = REQUIRED if name in required else prop.get("default")
            yield key, _values(prop, defs), default, _one_line(prop.get("description", "")), method
        for section in whole:
            yield from _walk(section, defs, f"{key}.", method)


def _references(prop: dict[str, Any]) -> list[str]:
    """The classes that a key may hold, each once."""
    found: list[str] = []
    for name, value in prop.items():
        if name == "$ref":
            found.append(value)
        elif name in ("anyOf", "oneOf", "allOf"):
            found += [ref for part in value for ref in _references(part)]
        elif name == "items":
            found += _references(value)
    return list(dict.fromkeys(found))


LIMITS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
MOST = (1 << 31) - 1  # larger limits are those of the machine
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true | false"}


def _values(prop: dict[str, Any], defs: dict[str, Any]) -> str:
    """What may be written, in words: `whole number > 0`, `int8 | int4`."""
    if "$ref" in prop:
        target = defs[prop["$ref"].rpartition("/")[2]]
        return "mapping" if "properties" in target else _values(target, defs)
    if "const" in prop:
        return str(prop["const"])
    if "enum" in prop:
        return " | ".join(map(str, prop["enum"]))
    for name in ("anyOf", "oneOf"):
        if name in prop:
            parts = [_values(part, defs) for part in prop[name] if part.get("type") != "null"]
            return " | ".join(dict.fromkeys(parts))
    kind = prop.get("type")
    if kind == "array":
        return f"list of {_values(prop.get('items', {}), defs)}"
    if kind == "object":
        return "mapping"
    limits = [f"{sign} {prop[name]:g}" for name, sign in LIMITS.items() if name in prop and prop[name] < MOST]
    return " ".join([TYPES.get(str(kind), "any value"), ", ".join(limits)]).strip()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def explain(name: str | None) -> list[str]:
    """What a key does, or the keys of a section. UserError for a name that is no key, with the nearest one."""
    here, below = named(name)
    if name is None:
        return _index(below)
    if here and not (below and "." not in name):
        return [line for key in here for line in _lines(key)] + [f"  {key.name}" for key in below]
    if below:
        return _index(below)
    if (foreign := foreign_name(name, {key.name for key in keys()})) is not None:
        return [f"{name} is another tool's key: {foreign}"]
    raise unknown(name)


def named(name: str | None) -> tuple[list[Key], list[Key]]:
    """(the keys of this name, also without its section; those below it)"""
    everything = keys()
    if name is None:
        return [], everything
    here = [key for key in everything if key.name == name]
    if not here and "." not in name:
        here = [key for key in everything if key.name.rpartition(".")[2] == name]
    return here, [key for key in everything if key.name.startswith(f"{name}.")]


def unknown(name: str) -> UserError:
    everything = keys()
    close = difflib.get_close_matches(name, [key.name for key in everything], n=1, cutoff=0.5)
    sections = ", ".join(dict.fromkeys(key.name.partition(".")[0] for key in everything if "." in key.name))
    fix = f"did you mean {close[0]}?" if close else f"a key, or one of the sections {sections}"
    fix = foreign_name(name, {key.name for key in everything}) or fix
    return UserError(f"no recipe has the key {name!r}", fix=fix)


def as_json(name: str | None) -> list[dict[str, Any]]:
    """The same as values; `default` is null where it is unset, and missing where the key must be given."""
    here, below = named(name)
    if not here and not below:
        raise unknown(str(name))
    return [
        {
            "key": key.name, "values": key.values, **({} if key.default is REQUIRED else {"default": key.default}),
            "required": key.default is REQUIRED, "description": key.description, "stages": key.stages,
            "methods": key.methods,
        }
        for key in [*here, *below]
    ]  # fmt: skip


def _index(everything: list[Key]) -> list[str]:
    """Every key once, with the first sentence of what it does."""
    width = max(len(key.name) for key in everything)
    said = ((key.name, _first_sentence(translated(key.description))) for key in everything)
    return list(dict.fromkeys(f"{name:{width}}  {text}" for name, text in said))


def _lines(key: Key) -> list[str]:
    scope = f"   ({key.scope})" if key.scope else ""
    values = " | ".join(map(translated, key.values.split(" | ")))
    head = f"{key.name}: {values}   {translated('default')}: {translated(key.shown_default)}{scope}"
    return [head, f"  {translated(key.description)}"]


def _first_sentence(text: str) -> str:
    for stop in (". ", "。"):
        if stop in text:
            return text.partition(stop)[0] + stop.strip()
    return text


HEAD = """# Recipe keys

<!-- Made by `ft recipes explain --markdown > docs/recipe.md` from finetune/recipe/; do not edit. -->

A recipe is one YAML file: `version: 1`, `stage`, and the sections below. Only what differs from the defaults has to be
written; `--set section.key=value` overrides a key, `ft recipes explain section.key` shows this text in the terminal.
A key that a stage or method does not have is an error with its line.
"""


def document() -> str:
    """docs/recipe.md: a table per section, the adapter's by method."""
    everything = keys()
    lines = [HEAD]
    sections = list(dict.fromkeys(key.name.partition(".")[0] for key in everything if "." in key.name))
    top = [key for key in everything if "." not in key.name and key.name not in sections]
    lines += _table("Top level", top)
    for section in sections:
        rows = [key for key in everything if key.name.startswith(f"{section}.")]
        if section != "adapter":
            lines += _table(section, rows)
            continue
        lines += ["## adapter", "", "`adapter.method` selects one of these; `sft`, `dpo`, `kto`, `reward` and `ppo` "
                  "use lora when it is unset, `pretrain` full. More: [methods.md](methods.md).", ""]  # fmt: skip
        for method in ADAPTERS:
            own = [key for key in rows if method in key.methods and key.name != "adapter.method"]
            about = next(key.description for key in rows if key.name == "adapter.method" and method in key.methods)
            lines += [f"### {method}", "", about, ""]
            lines += _table(None, own, scope=False) if own else []
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str | None, rows: list[Key], scope: bool = True) -> list[str]:
    lines = [f"## {title}", ""] if title else []
    lines += ["| key | values | default | what it does |", "|---|---|---|---|"]
    for key in rows:
        where = f"*{key.scope}:* " if scope and key.scope else ""
        values = f"`{key.values}`".replace("|", "\\|")
        lines.append(f"| `{key.name}` | {values} | `{key.shown_default}` | {where}{key.description} |")
    return [*lines, ""]
