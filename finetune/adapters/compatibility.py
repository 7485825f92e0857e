"""What cannot be, with reasons: known from recipe and config.json, refused before anything is loaded. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune import ranks
from finetune.adapters.methods import FROM_WEIGHTS, METHODS, Method, of
from finetune.errors import Problem, UserError
from finetune.families import family
from finetune.recipe.stages import DpoRecipe, KtoRecipe, PpoRecipe, PretrainRecipe, Recipe, RewardRecipe, SftRecipe

AnyRecipe = TypeVar("AnyRecipe", PretrainRecipe, SftRecipe, DpoRecipe, KtoRecipe, RewardRecipe, PpoRecipe)


@dataclass(frozen=True)
class Limit:
    """One row: when it holds for a recipe, and why."""

    holds: Callable[[Any, Any, Any], bool]
    """Of (adapter section, model section, train section)."""
    key: str
    why: str
    fix: str


def quantized(*kinds: str) -> Callable[[Any, Any, Any], bool]:
    return lambda adapter, model, train: model.quantization in (kinds or ("int8", "int4"))


def init(*names: str) -> Callable[[Any, Any, Any], bool]:
    return lambda adapter, model, train: getattr(adapter, "init_lora_weights", "") in names


def both(*conditions: Callable[[Any, Any, Any], bool]) -> Callable[[Any, Any, Any], bool]:
    return lambda adapter, model, train: all(condition(adapter, model, train) for condition in conditions)


LIMITS: tuple[Limit, ...] = (
    Limit(
        lambda adapter, model, train: model.is_new and adapter.method != "full",
        "adapter.method", "a new model has nothing to adapt", "use method: full",
    ),
    Limit(
        lambda adapter, model, train: adapter.method == "other" and not model.adapter,
        "adapter.method",
        "other is what an adapter of another tool is called that is trained on; nothing new can be made of it",
        "give model.adapter, or use another method",
    ),
    Limit(
        both(lambda adapter, model, train: getattr(adapter, "use_dora", False), quantized("int8")),
        "adapter.use_dora",
        "DoRA unpacks int8 weights in every step, and peft 0.21 then loses their scales (on CPUs; not tried on GPUs)",
        "set model.quantization: int4, or use_dora: false",
    ),
    Limit(
        both(init("pissa", "olora"), quantized()), "adapter.init_lora_weights",
        "pissa and olora take their start out of the base's weights, and what would remain cannot be put back into "
        "quantized ones exactly",
        "use init_lora_weights: default or, on int4, loftq",
    ),
    Limit(
        lambda adapter, model, train: init("loftq")(adapter, model, train) and model.quantization != "int4",
        "adapter.init_lora_weights",
        "loftq makes up for what int4 rounds away, and this base is not in int4",
        "set model.quantization: int4, or init_lora_weights: default",
    ),
    Limit(
        lambda adapter, model, train: init(*FROM_WEIGHTS)(adapter, model, train) and bool(model.adapter),
        "adapter.init_lora_weights",
        "an adapter that is continued has its weights already", "leave init_lora_weights out",
    ),
    Limit(
        lambda adapter, model, train: getattr(adapter, "loraplus_lr_ratio", None) is not None and train.optim == "muon",
        "adapter.loraplus_lr_ratio",
        "muon scales every update to the same size, so B would not learn faster", "use train.optim: adamw",
    ),
    Limit(
        lambda adapter, model, train: adapter.trains == "vectors" and train.optim == "muon",
        "train.optim", "muon is for matrices, and this method trains vectors", "use train.optim: adamw",
    ),
    Limit(
        lambda adapter, model, train: init(*FROM_WEIGHTS)(adapter, model, train) and adapter.use_dora,
        "adapter.use_dora",
        "DoRA takes its magnitudes from the base's weights before these starts change what they stand for",
        "use init_lora_weights: default, or use_dora: false",
    ),
    Limit(
        lambda adapter, model, train: init("orthogonal")(adapter, model, train) and adapter.r % 2 == 1,
        "adapter.r",
        "an orthogonal start shares its vectors out between A and B, so the rank must be even", "use an even r",
    ),
    Limit(
        lambda adapter, model, train: adapter.method == "adalora" and adapter.target_r >= adapter.init_r,
        "adapter.target_r",
        "AdaLoRA cuts ranks and never adds any, so target_r must be below init_r",
        "lower target_r or raise init_r",
    ),
    Limit(
        lambda adapter, model, train: adapter.method == "prompt_tuning"
        and (adapter.prompt_tuning_init == "text") != bool(adapter.prompt_tuning_init_text),
        "adapter.prompt_tuning_init_text",
        "prompt_tuning_init: text and prompt_tuning_init_text go together", "give both or none",
    ),
    Limit(
        lambda adapter, model, train: adapter.method == "prefix_tuning"
        and (adapter.prefix_init == "text") != bool(adapter.prefix_init_text),
        "adapter.prefix_init_text", "prefix_init: text and prefix_init_text go together", "give both or none",
    ),
    Limit(
        lambda adapter, model, train: adapter.method == "prefix_tuning"
        and adapter.prefix_projection and adapter.prefix_init == "text",
        "adapter.prefix_init",
        "with prefix_projection the prefix comes out of a network, which starts at random",
        "leave prefix_init out, or set prefix_projection: false",
    ),
)  # fmt: skip


def check_base(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """UserError for what cannot be on the base of this config.json."""
    row = family(config["model_type"])
    if getattr(recipe.adapter, "init_lora_weights", None) == "loftq" and row.layout:
        raise UserError(
            f"loftq reads the base's weights by name, and {row.name}'s original layout has other names",
            key="adapter.init_lora_weights", fix="use init_lora_weights: default",
        )  # fmt: skip


def tensor_parallel(recipe: Recipe) -> Iterator[Problem]:
    """What does not go with layers of which each process has a part."""
    adapter: Any = recipe.adapter
    if recipe.model.is_new:
        what = "a new model has no weights of which each process could read its part"
        yield Problem(what, key="model.config", fix="use --launch ddp or fsdp")
    if recipe.model.quantization is not None:
        what = f"weights in {recipe.model.quantization} are packed, and --launch tp cuts them up"
        yield Problem(what, key="model.quantization", fix="leave it out, or use --launch fsdp or ddp")
    if recipe.model.dtype == "float16":
        what = "whether the gradients of a step are finite each process would see of its part alone"
        yield Problem(what, key="model.dtype", fix="use bfloat16, or --launch fsdp")
    if recipe.train.neftune_noise_alpha is not None:
        yield Problem("has not been tried with --launch tp", key="train.neftune_noise_alpha", fix="leave it out")
    if adapter.method == "full":
        return
    if adapter.method != "lora":
        what = f"{adapter.method} has not been tried with --launch tp"
        yield Problem(what, key="adapter.method", fix="use lora or full")
    for key in ("use_dora", "lora_dropout", "modules_to_save"):
        if getattr(adapter, key, None):
            draws = key == "lora_dropout"
            what = "each process would draw for its own part" if draws else "has not been tried with --launch tp"
            yield Problem(what, key=f"adapter.{key}", fix="leave it out")


def check(recipe: Recipe) -> None:
    """UserError listing every limit that the recipe meets."""
    row = METHODS[recipe.adapter.method]
    own = [] if row.not_quantizable is None else [Limit(quantized(), "model.quantization", *row.not_quantizable)]
    problems = [
        Problem(limit.why, key=limit.key, fix=limit.fix)
        for limit in (*own, *LIMITS)
        if limit.holds(recipe.adapter, recipe.model, recipe.train)
    ]
    if ranks.side_by_side():
        problems += tensor_parallel(recipe)
    if problems:
        raise UserError(problems)


def continued(recipe: AnyRecipe, stored: Mapping[str, Any], folder: Any) -> AnyRecipe:
    """The recipe with an `adapter` section that says what the adapter of model.adapter is.

    UserError with every key in which the recipe asks for something else: the adapter on disk is what would be trained
    all the same. Targets are compared where the network is known (`methods.check_targets`).

    Args:
        stored: adapter_config.json in `folder`.
    """
    method = str(stored["peft_type"]).lower()
    if method not in METHODS:
        method, stored = "other", {**stored, "kind": str(stored["peft_type"])}
    row: Method = METHODS[method]
    section = recipe.adapter if "adapter" in recipe.model_fields_set else None
    if section is not None and section.method != method:
        raise UserError(
            f"model.adapter is {method}, and would be trained on as that", path=folder, key="adapter.method",
            fix="leave out the section adapter, or model.adapter",
        )  # fmt: skip
    fields, stored = row.section.model_fields, row.from_stored(stored)
    kept = set(fields) & set(stored) - {"method", *row.any_time, *row.only_new}
    values = {key: stored[key] for key in sorted(kept) if stored[key] is not None}
    problems = []
    for key in sorted(section.model_fields_set - {"method", *row.any_time}) if section is not None else ():
        given = getattr(section, key)
        if key == "target_modules" and given is not None:
            continue
        if key in kept:
            if not _same(given, stored[key]):
                problems.append(
                    Problem(f"model.adapter has {stored[key]} here", folder, key=f"adapter.{key}", fix="leave it out")
                )
        elif given != fields[key].default:
            what = "says how a new adapter is made, and that of model.adapter has its weights already"
            problems.append(Problem(what, folder, key=f"adapter.{key}", fix="leave it out, or model.adapter"))
    if problems:
        raise UserError(problems)
    if section is not None:
        values |= {key: getattr(section, key) for key in section.model_fields_set & {*row.any_time}}
    return recipe.model_copy(update={"adapter": _section(row.section, {**values, "method": method})})


def _same(given: Any, stored: Any) -> bool:
    if isinstance(given, list) or isinstance(stored, list):
        return {*(given or ())} == {*(stored or ())}
    return bool(given == stored)


def _section(made: Any, values: dict[str, Any]) -> Any:
    """Without what other tools allow and a recipe does not say (an OFT by number of blocks, an alpha below zero)."""
    try:
        return made.model_validate(values)
    except ValidationError as error:
        wrong = {str(problem["loc"][0]) for problem in error.errors()}
        return made.model_validate({key: value for key, value in values.items() if key not in wrong})


# peft's methods that have no section here: why their adapters are no part of any weight.
OTHERS_NOT_MERGEABLE = {
    "MULTITASK_PROMPT_TUNING": str(METHODS["prompt_tuning"].not_mergeable),
    "CPT": str(METHODS["prompt_tuning"].not_mergeable),
    "CARTRIDGE": str(METHODS["prefix_tuning"].not_mergeable),
    "ADAPTION_PROMPT": "its prompts stand before the text and are no part of any weight",
    "XLORA": "it mixes several adapters anew for every token",
    "POLY": "it mixes several adapters by task",
}


def check_merge(adapter_config: Mapping[str, Any], model_type: str, path: Any = None) -> None:
    """UserError if the adapter of this adapter_config.json can never be merged, before anything is loaded."""
    kind = str(adapter_config.get("peft_type"))
    why = of(kind).not_mergeable or OTHERS_NOT_MERGEABLE.get(kind)
    if why is not None:
        raise UserError(
            f"{kind.lower()} cannot be merged: {why}", path=path, key="--adapter",
            fix="use it as it is: ft eval, ft chat and peft load it onto the base",
        )  # fmt: skip
    if of(kind).adds_biases:
        slots = family(model_type).biased
        names = {str(name).rpartition(".")[2] for name in adapter_config["target_modules"]}
        if slots and not names <= slots:
            raise UserError(
                f"{model_type} checkpoints cannot hold a bias on {', '.join(sorted(names - slots))}", path=path,
                key="--adapter", fix="use it as it is, or train it with adapter.targets: storable",
            )  # fmt: skip
