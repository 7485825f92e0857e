"""`--set key=value`: the values of a recipe file with it, and what it makes pointless in them."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.problems import KeyPath, models_in
from finetune.recipe.reading import parse_value
from finetune.recipe.stages import RECIPES

REWARD_TRAINING = ("learning_rate", "num_train_epochs", "center_rewards_coefficient")


def override(values: dict[str, Any], overrides: Sequence[str]) -> set[KeyPath]:
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


def forget_other_method(values: dict[str, Any], before: Any, overridden: AbstractSet[KeyPath]) -> list[str]:
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


def forget_other_reward(values: dict[str, Any], overridden: AbstractSet[KeyPath]) -> list[str]:
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


def unset(values: dict[str, Any], overridden: AbstractSet[KeyPath]) -> None:
    """`--set adapter.r=null` means the default, in place, where null is no value of the key itself."""
    kind = RECIPES.get(str(values.get("stage")))
    for path in overridden:
        node: Any = values
        classes: list[type[BaseModel]] = [] if kind is None else [kind]
        for part in path[:-1]:
            classes = [m for c in classes if part in c.model_fields for m in models_in(c.model_fields[part].annotation)]
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or path[-1] not in node or node[path[-1]] is not None:
            continue
        fields = [c.model_fields[path[-1]] for c in classes if path[-1] in c.model_fields]
        if fields and not any(type(None) in get_args(field.annotation) for field in fields):
            del node[path[-1]]
