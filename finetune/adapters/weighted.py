"""Several adapters as one: which can be, and by what rule, from their files alone. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.consumers import Key, largest_rank, unfit
from finetune.adapters.methods import rewrites
from finetune.data import thinking
from finetune.errors import Problem, UserError
from finetune.models import sources
from finetune.places import read_json

ONE_BY_ONE = "combine adapters of one kind, or merge them one after the other"
KINDS = {
    "cat": "the weighted sum itself: their matrices stand side by side, and the rank is the sum of theirs",
    "svd": "the weighted sum cut to a rank, by singular values",
    "linear": "A and B are each summed with the root of weight × scale (peft's linear): beside the weighted sum their "
    "product holds what one adapter's B makes of another's A",
    "ties": "as linear, of the largest entries of each A and B, the mean of those that agree in sign (peft's ties)",
    "dare_ties": "as ties, of entries drawn at random and scaled up for those dropped (peft's dare_ties)",
}
OF_FACTORS = ("linear", "ties", "dare_ties")
"""Kinds that add A to A and B to B, which must then be of one shape."""
DENSITY = 0.5


@dataclass(frozen=True)
class Part:
    """An adapter and what it counts for."""

    folder: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Combination:
    kind: str
    density: float | None = None
    """Share of the entries that ties and dare_ties keep."""
    seed: int | None = None
    """Of what dare_ties draws."""
    svd_rank: int | None = None
    """None for the largest rank among them."""


LIMITS = (
    Key("use_dora", "DoRA scales each column anew, and two such scales have no sum"),
    Key("bias", "trained biases of the base have no sum with another adapter's", lambda value: value == "none"),
    Key("lora_bias", "biases of B are not combined by peft"),
    Key("modules_to_save", "modules that were trained whole cannot be weighed"),
    Key("trainable_token_indices", "single trained tokens cannot be weighed"),
    Key("target_parameters", "peft combines no adapters on bare parameters (experts)"),
    Key("layer_replication", "layers that stand twice are another network"),
    Key(
        "init_lora_weights", "it rewrites the base's weights when it is loaded",
        lambda value: not rewrites(value),
    ),
)  # fmt: skip
"""Keys that have no place in a sum of A and B."""


def split(text: str) -> tuple[str, float]:
    """(place, weight) of PLACE[:WEIGHT]. A path that exists is a path, whatever stands behind its last colon.

    UserError for a weight that adapters cannot have.
    """
    place, colon, said = text.rpartition(":")
    if not (colon and place and said) or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(said)
    except ValueError:  # C:\runs\a, or a name that is not there, which is said elsewhere
        return text, 1.0
    if not math.isfinite(weight) or weight == 0:
        fix = "leave it out" if weight == 0 else "give a number, as 0.7"
        raise UserError(f"cannot be weighed with {said}", path=place, key="--adapter", fix=fix)
    return place, weight


def parts_of(adapters: Sequence[str]) -> list[Part]:
    """UserError for what is no adapter, or is given twice."""
    found = []
    for text in adapters:
        place, weight = split(text)
        found.append(Part(sources.adapter_folder(place), weight))
    for number, part in enumerate(found):
        if part.folder in [other.folder for other in found[:number]]:
            raise UserError("is given twice", path=part.folder, key="--adapter", fix="give it once, with both weights")
    return found


def combination(
    parts: Sequence[Part], kind: str | None, density: float | None, seed: int | None, svd_rank: int | None
) -> Combination | None:
    """How they are combined; None for one adapter as it is. UserError for options without an effect."""
    key = "--combine"
    if len(parts) == 1:
        given = {key: kind, "--density": density, "--seed": seed, "--svd-rank": svd_rank}
        for name, value in given.items():
            if value is not None:
                raise UserError("has no effect on one adapter", key=name, fix="leave it out, or give another --adapter")
        return None if parts[0].weight == 1 else Combination("cat")
    kind = kind or "cat"
    if kind not in KINDS:
        raise UserError(f"unknown combination {kind!r}", key=key, fix=f"one of {', '.join(KINDS)}")
    problems = []
    options: list[tuple[str, Any, tuple[str, ...]]] = [
        ("--density", density, ("ties", "dare_ties")), ("--seed", seed, ("dare_ties",)),
        ("--svd-rank", svd_rank, ("svd",)),
    ]  # fmt: skip
    for name, value, kinds in options:
        if value is not None and kind not in kinds:
            problems.append(
                Problem(f"has no effect on {kind}", key=name, fix=f"leave it out; {' and '.join(kinds)} use it")
            )
    if density is not None and not 0 < density < 1:
        problems.append(Problem(f"is {density:g}", key="--density", fix="give a share between 0 and 1, as 0.5"))
    if kind in ("ties", "dare_ties"):
        problems += [
            Problem(f"a weight below zero ({part.weight:g}): {kind} votes on signs before it weighs", part.folder,
                    key="--adapter", fix="use --combine cat or svd")
            for part in parts if part.weight < 0
        ]  # fmt: skip
    if problems:
        raise UserError(problems)
    if kind in ("ties", "dare_ties"):
        density = DENSITY if density is None else density
    return Combination(kind, density, (seed or 0) if kind == "dare_ties" else None, svd_rank)


def check(parts: Sequence[Part], how: Combination) -> None:
    """UserError, with every reason, for adapters that are not of one kind."""
    configs = [read_json(part.folder / "adapter_config.json") for part in parts]
    problems: list[Problem] = []
    for part, config in zip(parts, configs, strict=True):
        kind = str(config.get("peft_type"))
        if kind != "LORA":
            what = f"is {kind.lower()}, and only adapters of type lora can be weighed and combined"
            problems.append(Problem(what, part.folder, key="--adapter", fix="merge it by itself, without a weight"))
            continue
        for limit in unfit(LIMITS, config):
            what = f"has {limit.name}: {limit.why}"
            problems.append(Problem(what, part.folder, key="--adapter", fix="merge it by itself, without a weight"))
    if problems:
        raise UserError(problems)
    first = parts[0]
    for part, config in zip(parts[1:], configs[1:], strict=True):
        for what, ours, theirs in differences(first.folder, part.folder):
            said = f"{what} is {theirs}, that of {first.folder} {ours}"
            problems.append(Problem(said, part.folder, key="--adapter", fix=ONE_BY_ONE))
        ranks = largest_rank(configs[0]), largest_rank(config)
        if how.kind in OF_FACTORS and ranks[0] != ranks[1]:
            said = (
                f"its rank is {ranks[1]}, that of {first.folder} {ranks[0]}, and {how.kind} adds matrices of one shape"
            )
            problems.append(Problem(said, part.folder, key="--combine", fix="use cat or svd"))
    if problems:
        raise UserError(problems)


def differences(first: Path, other: Path) -> list[tuple[str, str, str]]:
    """(what, of the first, of the other): of what both say something about, and not the same."""
    mine, theirs = (read_json(folder / "base_identity.json") for folder in (first, other))
    found = []
    prints = mine.get("fingerprint"), theirs.get("fingerprint")
    if all(prints):
        if prints[0] != prints[1]:
            found.append(("its base", f"{mine.get('base')}", f"{theirs.get('base')}, other weights"))
    elif None not in (names := [said_base(folder) for folder in (first, other)]) and names[0] != names[1]:
        found.append(("its base", str(names[0]), str(names[1])))
    if mine and theirs and mine.get("rope_scaling") != theirs.get("rope_scaling"):
        found.append(("its rope scaling", str(mine.get("rope_scaling")), str(theirs.get("rope_scaling"))))
    templates = [one.get("chat_template_sha256") for one in (mine, theirs)]
    if all(templates) and templates[0] != templates[1]:
        found.append(("its chat template", "another", f"sha256 {str(templates[1])[:12]}…"))
    records = [thinking.read(folder) for folder in (first, other)]
    if all(records):
        shown = [f"{one['data.thinking']} (shown {', '.join(one['shown'])})" for one in records]
        if shown[0] != shown[1]:
            found.append((f"its record of thinking ({thinking.FILE})", shown[0], shown[1]))
    return found


def said_base(folder: Path) -> str | None:
    said = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return str(said) if said else None
