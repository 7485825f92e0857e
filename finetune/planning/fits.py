"""What fits a machine's memory: the most rows, the longest rows, and the cheapest change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.adapters import compatibility
from finetune.errors import UserError
from finetune.planning.memory import Estimate, estimate, writes
from finetune.planning.network import Network, build
from finetune.recipe.file import check, to_yaml
from finetune.recipe.resolve import Hardware, a_step
from finetune.recipe.stages import PpoRecipe, Recipe

USABLE = {"cuda": 0.95, "mps": 0.5, "cpu": 0.5}
"""Share of the memory that a run may plan with; in main memory other programs live, too."""
MOST_TOKENS_ON_CPU = 12_288  # of a pass: more at once is not faster there
STEP = 64  # tokens, in which lengths are planned
CLOSE = 0.06  # what is said to fit may be so much less than what does
UNPACKED = {"int8": 1.25, "int4": 1.3}
"""Seconds a step against bfloat16, measured on a CPU with a model of 112M parameters."""
ROWS = "train.per_device_train_batch_size"
CUT = ("data.max_length", "ppo.max_new_tokens")
"""What costs no time and some of the data: the last of the changes."""


Option = tuple[dict[str, Any], float | None, str]
"""(settings, slowdown where it is not computed, what it costs)"""


Networks = dict[tuple[Any, ...], Network]
"""By `kind_of`."""


@dataclass(frozen=True)
class Change:
    settings: dict[str, Any]
    """{key: value} of the recipe."""
    slowdown: float
    """Time of the same work, against before."""
    why: str
    peak: int
    recipe: Recipe


def budget(machine: Hardware) -> float:
    """Bytes that a run may take."""
    return machine.memory_gb * 1e9 * USABLE.get(machine.device, USABLE["cpu"])


def most(peak: Callable[[int], int], limit: float, cap: int, start: int = 1, close: float = 0.0) -> int:
    """The largest n up to cap whose peak is within the limit; 0 where none is.

    Args:
        peak: rises with n. start: where to look first; close: how far below the largest the answer may be, as a share.
    """
    low, high, n = 0, cap + 1, min(max(1, start), cap)
    while low < n:  # upwards, doubling
        if peak(n) > limit:
            high = n
            break
        low, n = n, min(cap, 2 * n)
    straight = True
    while high - low > max(1, int(close * low)) and low < cap:
        guess = (low + high) // 2
        if straight and low and high <= cap:
            guess = low + int((high - low) * (limit - peak(low)) / (peak(high) - peak(low)))
        guess, straight = min(max(guess, low + 1), high - 1), not straight
        if peak(guess) <= limit:
            low = guess
        else:
            high = guess
    return low


def rows_that_fit(network: Network, recipe: Recipe, length: int, machine: Hardware, cap: int, start: int) -> int:
    """Rows per pass, at most cap; 0 where not even one fits. start: where to look first."""
    limit = budget(machine)
    return most(lambda n: estimate(network, recipe, n, length, machine.device, 2).peak, limit, cap, start, CLOSE)


def length_that_fits(network: Network, recipe: Recipe, now: Estimate, machine: Hardware, cap: int) -> int:
    """Tokens of a row, in steps of STEP, for as many rows as now; at most cap."""

    def peak(n: int) -> int:
        return estimate(network, recipe, now.rows, n * STEP, machine.device).peak

    return STEP * most(peak, budget(machine), max(1, cap // STEP), max(1, now.length // STEP), CLOSE)


def changes(
    recipe: Recipe, skeleton: Any, now: Estimate, machine: Hardware, limit: float | None = None,
    built: Network | None = None,
) -> list[Change]:  # fmt: skip
    """What makes a recipe that does not fit fit, the cheapest first; alone, or where nothing does alone, together.

    Args:
        limit: bytes that are enough; by default what can be planned with on that machine.
        built: the recipe's network, where it is at hand.
    """
    networks: Networks = {} if built is None else {kind_of(recipe): built}
    limit, found = budget(machine) if limit is None else limit, dict[tuple[str, ...], Change]()
    options = [option for option in candidates(recipe, now.length) if is_allowed(recipe, option[0])]
    for option in options:
        if tuple(option[0]) in found:
            continue  # fewer rows than are needed
        if (change := tried(recipe, skeleton, [option], now, machine, networks)) and change.peak <= limit:
            found[tuple(option[0])] = change
    if not found and (change := together(recipe, skeleton, options, now, machine, limit, networks)):
        return [change]
    return sorted(found.values(), key=lambda change: (any(key in CUT for key in change.settings), change.slowdown))


def together(
    recipe: Recipe, skeleton: Any, options: list[Option], now: Estimate, machine: Hardware, limit: float,
    networks: Networks,
) -> Change | None:  # fmt: skip
    """One after the other, until it fits; then without those that it fits without."""
    taken: dict[str, Option] = {}  # by the first key: of rows and of quantization the last one counts
    change = None
    for option in options:
        more = {**taken, next(iter(option[0])): option}
        if not is_allowed(recipe, merged(more.values())):
            continue
        taken, change = more, tried(recipe, skeleton, list(more.values()), now, machine, networks)
        if change is not None and change.peak <= limit:
            break
    else:
        return None
    for key in reversed(list(taken)[:-1]):  # the dearest first; without the last it did not fit
        fewer = [option for name, option in taken.items() if name != key]
        if not is_allowed(recipe, merged(fewer)):
            continue
        other = tried(recipe, skeleton, fewer, now, machine, networks)
        if other is not None and other.peak <= limit:
            del taken[key]
            change = other
    return change


def merged(options: Iterable[Option]) -> dict[str, Any]:
    return {key: value for settings, *_ in options for key, value in settings.items()}


def candidates(recipe: Recipe, length: int) -> Iterator[Option]:
    """Roughly by price.

    Args:
        length: tokens of the longest row, with its reply.
    """
    train = recipe.train
    if recipe.model.attn_implementation == "eager":
        yield {"model.attn_implementation": "sdpa"}, 1.0, "the scores of attention are nowhere whole"
    if train.optim in ("adamw", "paged_adamw"):
        yield {"train.optim": "adamw_8bit"}, 1.0, "its moments in 8 bits"
    for rows in fewer(recipe):
        yield rows_of_a_pass(recipe, rows), 1.0, "more passes of fewer rows: the same gradient"
    if not train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}, None, "computes the forward pass twice"
    if recipe.adapter.method == "full":
        yield {"adapter.method": "lora"}, None, "trains a small part"
    if recipe.model.quantization is None:
        yield {"model.quantization": "int8"}, UNPACKED["int8"], "the base is rounded to 8 bits"
    if recipe.model.quantization in (None, "int8"):
        yield {"model.quantization": "int4"}, UNPACKED["int4"], "the base is rounded to 4 bits"
    if writes(recipe) and recipe.eval.batch_size > 4:
        yield {"eval.batch_size": 4}, 1.0, "replies are written in smaller batches"
    if isinstance(recipe, PpoRecipe) and recipe.ppo.max_new_tokens > 32:
        yield {"ppo.max_new_tokens": recipe.ppo.max_new_tokens // 2}, 1.0, "longer replies are cut"
    asked = min(recipe.data.max_length, length - replied(recipe))
    if asked > 256:
        yield {"data.max_length": asked // 2}, 1.0, "longer rows are cut"


def fewer(recipe: Recipe) -> Iterator[int]:
    """Half the rows of a pass, and half of those, down to 1."""
    rows = recipe.train.per_device_train_batch_size or 1
    step = rows * accumulation(recipe)
    while rows := half(rows, step):
        yield rows


def half(rows: int, step: int) -> int:
    """Half of so many rows, or the next number below that divides the rows of a step; 0 of one row."""
    return max((n for n in range(1, rows // 2 + 1) if step % n == 0), default=0)


def rows_of_a_pass(recipe: Recipe, rows: int) -> dict[str, int]:
    """The settings for so many rows, with the rows of a step as they are."""
    step = a_step(recipe)[0].effective_batch_size
    passes = {} if recipe.data.packing or step % rows else {"train.gradient_accumulation_steps": step // rows}
    return {ROWS: rows, **passes}


def is_allowed(recipe: Recipe, settings: dict[str, Any]) -> bool:
    """Whether a recipe with these settings can be run: stage, method and quantization may refuse some."""
    other = changed(recipe, settings)
    try:
        check(yaml.safe_load(to_yaml(other)), other.stage)
        compatibility.check(other)
    except UserError:
        return False
    return recipe.model.adapter is None or "adapter.method" not in settings


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values. Resolved recipes stay resolved."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    update: dict[str, Any] = {}
    for section, values in sections.items():
        if section == "adapter":
            from finetune.recipe.adapters import LoraAdapter

            update[section] = LoraAdapter()
        else:
            update[section] = getattr(recipe, section).model_copy(update=values)
    return recipe.model_copy(update=update)


def kind_of(recipe: Recipe) -> tuple[Any, ...]:
    """Of the settings that may change, those that make another network, or another pass of as many tokens."""
    model, train = recipe.model, recipe.train
    network = model.quantization, model.attn_implementation, recipe.adapter.method, train.gradient_checkpointing
    return *network, replied(recipe)


def tried(
    recipe: Recipe, skeleton: Any, options: list[Option], now: Estimate, machine: Hardware,
    networks: Networks | None = None,
) -> Change | None:  # fmt: skip
    """None for what this network cannot have. networks: those that were built, which it adds to."""
    networks = {} if networks is None else networks
    settings = merged(options)
    other = changed(recipe, settings)
    if settings.get("train.gradient_checkpointing") and not skeleton.supports_gradient_checkpointing:
        return None
    kind = kind_of(other)
    try:
        network = networks[kind] = networks.get(kind) or build(other, skeleton)
    except UserError:
        return None
    rows = other.train.per_device_train_batch_size or now.rows
    length = min(now.length - replied(recipe), other.data.max_length) + replied(other)
    then = estimate(network, other, rows, length, machine.device, max(2, accumulation(other)))
    slowdown = math.prod(price for _, price, _ in options if price is not None)
    if any(price is None for _, price, _ in options):
        slowdown *= (then.flops / (then.rows * then.length)) / (now.flops / (now.rows * now.length))
    return Change(settings, slowdown, "; ".join(dict.fromkeys(why for *_, why in options)), then.peak, other)


def length_of(recipe: Recipe) -> int:
    """Tokens of the longest row that may come, with its reply."""
    return recipe.data.max_length + replied(recipe)


def replied(recipe: Recipe) -> int:
    """Tokens of the longest reply that is trained on, where replies are."""
    return recipe.ppo.max_new_tokens if isinstance(recipe, PpoRecipe) else 0


def accumulation(recipe: Recipe) -> int:
    """Passes of a step."""
    train, _ = a_step(recipe)
    return math.ceil(train.effective_batch_size / (train.per_device_train_batch_size or 1))
