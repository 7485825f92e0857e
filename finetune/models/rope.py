"""`model.rope_scaling`: contexts longer than those the base was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from finetune.errors import UserError
from finetune.families import family
from finetune.recipe.sections import ModelConfig, RopeScaling

KEY = "model.rope_scaling"
KEPT = ("rope_theta", "partial_rotary_factor")
YARN = ("attention_factor", "beta_fast", "beta_slow")


def apply(config: PretrainedConfig, scaling: RopeScaling | None, name: str) -> None:
    """Set `rope_parameters` and the new length, in place. UserError where the model has nothing to scale."""
    if scaling is None:
        return
    text: Any = config.get_text_config()
    old = getattr(text, "rope_parameters", None)
    if not old or getattr(text, "alibi", False):
        raise UserError(f"{config.model_type} has no rotary positions", path=name, key=KEY, fix="remove the key")
    if text.nested_rope_parameter_keys(old):
        raise UserError(
            f"{config.model_type} has several rotary embeddings, one per kind of layer", path=name, key=KEY,
            fix="remove the key; its long context is built in",
        )  # fmt: skip
    new = parameters(old, scaling, text.max_position_embeddings, name)
    if old.get("rope_type", "default") not in ("default", scaling.rope_type) and scaling.rope_type != "default":
        raise UserError(
            f"this base is already scaled ({old['rope_type']}, factor {old.get('factor')})", path=name, key=KEY,
            fix="remove the key; one scaling on top of another is neither",
        )  # fmt: skip
    if scaling.rope_type != "default":
        original = scaling.original_max_position_embeddings or _original(old, text.max_position_embeddings)
        # dynamic reads the original length here, the others carry it in rope_parameters or do not need it.
        longer = original if scaling.rope_type == "dynamic" else round(original * float(new["factor"]))
        text.max_position_embeddings = longer
    text.rope_parameters = new


def parameters(old: Mapping[str, Any], scaling: RopeScaling, length: int, name: str) -> dict[str, Any]:
    new: dict[str, Any] = {"rope_type": scaling.rope_type, **{k: old[k] for k in KEPT if k in old}}
    if scaling.rope_type == "default":
        return new
    if scaling.factor is None:
        raise UserError("missing", path=name, key=f"{KEY}.factor", fix="new length / original length")
    new["factor"] = scaling.factor
    if scaling.rope_type == "yarn":
        new["original_max_position_embeddings"] = scaling.original_max_position_embeddings or _original(old, length)
        new |= {key: value for key in YARN if (value := getattr(scaling, key)) is not None}
    return new


def _original(old: Mapping[str, Any], length: int) -> int:
    """The length before any scaling that config.json already holds."""
    if "original_max_position_embeddings" in old:
        return int(old["original_max_position_embeddings"])
    return round(length / old["factor"]) if old.get("rope_type") == "linear" else length


LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length")


def context(config: Mapping[str, Any], model: ModelConfig) -> int | None:
    """How many tokens the base was made for, with its rope_scaling; None where there is no such number."""
    scaling = model.rope_scaling
    known = next((int(config[key]) for key in LENGTHS if config.get(key)), None)
    if known is None or family(str(config.get("model_type"))).positions == "alibi" or config.get("alibi"):
        return None
    if scaling is not None and scaling.factor is not None:
        return round((scaling.original_max_position_embeddings or known) * scaling.factor)
    return known


def check_length(config: Mapping[str, Any], model: ModelConfig, longest: int, replies: str | None = None) -> str | None:
    """A warning when the longest sample has more tokens than the base was made for; UserError where that is the end of
    its table of positions.

    replies: where `longest` counts a sampled reply, too, the key of that reply's length.
    """
    name, limit = model.name, context(config, model)
    if limit is None or longest <= limit:
        return None
    shorter = f"set data.max_length: {limit}," if replies is None else f"set it and {replies} to {limit} together,"
    if family(config["model_type"]).positions == "learned":
        raise UserError(
            f"a sample has {longest} tokens, this model has {limit} positions", path=name, key="data.max_length",
            fix=f"{shorter} or use a model with rotary positions",
        )  # fmt: skip
    keys = " or ".join(["data.max_length", *([replies] if replies else [])])
    advice = f"set {KEY}: {{rope_type: yarn, factor: {-(-longest // limit)}}}, or a smaller {keys}"
    return f"the longest sample has {longest} tokens, {name} was made for {limit}: {advice}"
