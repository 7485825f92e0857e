"""The PEFT methods, a row each: how peft's config is made, what training, loading and merging must know. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finetune.adapters import configs
from finetune.adapters.targets import find, is_linear
from finetune.errors import UserError
from finetune.families import family
from finetune.recipe import adapters as sections

if TYPE_CHECKING:
    from torch import nn


def never(section: Any) -> bool:
    return False


def always(section: Any) -> bool:
    return True


@dataclass(frozen=True)
class Method:
    section: type[sections.AdapterSection]
    """Its keys in a recipe, and whether they make matrices or vectors."""
    make_config: Callable[[Any, Any], Any] | None = None
    """Of (model, section): peft's config. None where no new adapter can be made."""
    initialise: Callable[[Any, Any, Any, Path | None], None] | None = None
    """Of (adapted model, section, tokenizer, folder of the base): start values other than peft's."""
    starts_as_base: Callable[[Any], bool] = always
    """Of the section: whether a fresh adapter computes what the base does."""
    virtual_tokens: Literal["embeddings", "cache"] | None = None
    """Where learned tokens stand before the text. Rows are then not packed, and peft saves the tokens without the
    network that made them: it loads them to be used, and `soft_prompts.prepare` lets them be trained on."""
    needs_state: bool = False
    """Whether a checkpoint holds more than what peft saves (`resume`)."""
    cuts_ranks: bool = False
    """Whether ranks are cut by a plan over all steps (`adalora`)."""
    adds_biases: bool = False
    """Whether merging writes biases, for which a checkpoint must have a place."""
    not_mergeable: str | None = None
    """Why its adapters are no part of any weight."""
    not_quantizable: tuple[str, str] | None = None
    """Why it cannot train on int8 and int4, and what to do instead."""
    only_new: tuple[str, ...] = ()
    """Keys of both section and peft's config that say how a new adapter is made, and nothing of one that is there."""
    any_time: tuple[str, ...] = ()
    """Keys that say how training goes and stand in no adapter: they hold for one that is trained on, too."""
    from_stored: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """adapter_config.json with the section's keys for what it says in other words."""
    own: bool = False
    """Whether peft knows it only after `finetune.register()`."""
    learning_rate: float = 1.0
    """The usual one, relative to LoRA's: what moves few or shared numbers needs more."""


def start_lora(adapted: Any, section: Any, tokenizer: Any, folder: Path | None) -> None:
    from finetune.adapters import lora_init

    lora_init.start(adapted, section, folder)


def start_prompt(adapted: Any, section: Any, tokenizer: Any, folder: Path | None) -> None:
    from finetune.adapters import soft_prompts

    soft_prompts.initialise(adapted, section, tokenizer)


SUM = (
    "LoHa and LoKr add their update to the weight itself, and peft's do not unpack quantized weights",
    "use adapter.method: lora, or leave model.quantization out",
)
INTEGERS = (
    "quantized weights are integers and have no gradient, so they cannot all be trained",
    "leave model.quantization out, or use adapter.method: last_layers, whose blocks are kept unquantized, or lora",
)
FROM_WEIGHTS = ("pissa", "olora", "loftq")
"""Starts of LoRA that are taken from the base's weights: with the adapter off, the base is another model."""
REWRITING = ("pissa", "olora", "corda")
"""How the names of those begin (pissa_niter_16) for which peft rewrites the base's weights, also when it loads one."""
PROMPT_START = ("prompt_tuning_init", "prompt_tuning_init_text")
UNKNOWN_STEPS = 1 << 30  # until the data is counted: see `adalora.plan`


def rewrites(start: Any) -> bool:
    """Whether init_lora_weights is one of REWRITING."""
    return str(start).lower().startswith(REWRITING)


def soft_prompt(section: type[sections.AdapterSection], where: Literal["embeddings", "cache"], **more: Any) -> Method:
    what = "embeddings stand" if where == "embeddings" else "keys and values stand"
    return Method(
        section, initialise=start_prompt, starts_as_base=never, virtual_tokens=where, needs_state=True,
        not_mergeable=f"its {what} before the text and are no part of any weight", **more,
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "lora": Method(
        sections.LoraAdapter, configs.lora, start_lora, lambda section: section.init_lora_weights not in FROM_WEIGHTS,
        only_new=("init_lora_weights",), any_time=("loraplus_lr_ratio",),
    ),
    "adalora": Method(
        sections.AdaLoraAdapter,
        configs.plain("AdaLoraConfig", "tinit", "tfinal", bias="none", total_step=UNKNOWN_STEPS),
        needs_state=True, cuts_ranks=True, any_time=("tinit", "tfinal"),
    ),
    "vera": Method(sections.VeraAdapter, configs.plain("VeraConfig"), only_new=("d_initial",), learning_rate=3.0),
    "oft": Method(sections.OftAdapter, configs.oft),
    "loha": Method(sections.LohaAdapter, configs.plain("LoHaConfig"), not_quantizable=SUM),
    "lokr": Method(sections.LokrAdapter, configs.plain("LoKrConfig"), not_quantizable=SUM),
    "bottleneck": Method(
        sections.BottleneckAdapter, configs.bottleneck, own=True,
        not_mergeable="its networks are non-linear and no part of any weight",
    ),
    "ia3": Method(sections.Ia3Adapter, configs.ia3, learning_rate=3.0),
    "prompt_tuning": soft_prompt(
        sections.PromptTuningAdapter, "embeddings", learning_rate=10.0,
        make_config=configs.plain("PromptTuningConfig", *PROMPT_START), only_new=PROMPT_START,
    ),
    "p_tuning": soft_prompt(
        sections.PTuningAdapter, "embeddings", learning_rate=3.0, make_config=configs.plain("PromptEncoderConfig")
    ),
    "prefix_tuning": soft_prompt(
        sections.PrefixTuningAdapter, "cache", learning_rate=3.0,
        make_config=configs.plain("PrefixTuningConfig", "prefix_init", "prefix_init_text"),
    ),
    "bitfit": Method(sections.BitFitAdapter, configs.bitfit, adds_biases=True, own=True, learning_rate=3.0),
    "last_layers": Method(
        sections.LastLayersAdapter, configs.last_layers, own=True, learning_rate=0.1,
        from_stored=lambda stored: {**stored, "head": bool(stored.get("modules_to_save"))},
    ),
    "ln_tuning": Method(sections.LnTuningAdapter, configs.ln_tuning, learning_rate=3.0),
    "full": Method(sections.FullAdapter, not_quantizable=INTEGERS, learning_rate=0.1),
    "other": Method(sections.OtherAdapter),
}  # fmt: skip


def of(peft_type: Any) -> Method:
    """The row of a stored adapter: of adapter_config.json's peft_type."""
    return METHODS.get(str(getattr(peft_type, "value", peft_type)).lower(), METHODS["other"])


def active(model: Any) -> Method:
    """The row of the adapter that computes; `full` for a model without one."""
    config = getattr(model, "active_peft_config", None)
    return METHODS["full"] if config is None else of(config.peft_type)


def is_before_text(model: Any) -> bool:
    """Whether left padding changes the answer: the padding would stand between virtual tokens and text, and shift
    positions (huggingface/peft#1093). A prefix lives in the cache and has no such problem."""
    return active(model).virtual_tokens == "embeddings"


def sees_padding(model: Any) -> bool:
    """Whether left padding changes the answer, for this or another reason: rows of one length are answered together."""
    return is_before_text(model) or not family(model.config.model_type).left_padding


def without_head(section: Any) -> Any:
    """The section without the output head among what it trains whole."""
    return section.model_copy(update={"head": False}) if "head" in type(section).model_fields else section


def check(model: nn.Module, section: sections.Adapter, quantized: bool = False) -> None:
    """UserError for targets that are not there; `model` may be without weights (on torch's meta device).

    Args:
        quantized: whether its linear layers will be held as integers.
    """
    make_config = METHODS[section.method].make_config
    if make_config is None:
        return
    make_config(model, section)
    whole = getattr(section, "modules_to_save", None)
    if quantized and whole:
        head = model.get_output_embeddings()  # type: ignore[operator]  # it keeps its precision
        for name in find(model, whole, "adapter.modules_to_save"):
            if any(is_linear(m) and m is not head for m in model.get_submodule(name).modules()):
                raise UserError(
                    f"{name} is held as integers here, which have no gradient: it cannot be trained whole",
                    key="adapter.modules_to_save", fix="leave it out, or model.quantization",
                )  # fmt: skip


def check_targets(model: nn.Module, adapted: Any, section: sections.Adapter, folder: Path) -> None:
    """UserError where a recipe names other targets than those of the adapter that it trains on.

    Args:
        model: the base without weights, adapted: the same with the adapter of `folder` on it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted: Any = getattr(section, "target_modules", None)
    same_method = adapted.peft_config["default"].peft_type.value == section.method.upper()
    if "target_modules" not in section.model_fields_set or wanted is None or not same_method:
        return
    have = {n for n, m in adapted.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
    have &= {name for name, _ in model.named_modules()}  # without single trained tokens, which are inside a wrapper
    if (given := set(find(model, wanted))) != have:
        name = min(given ^ have)
        what = f"model.adapter {'does not reach' if name in given else 'also reaches'} {name}"
        raise UserError(what, path=folder, key="adapter.target_modules", fix="leave it out")
