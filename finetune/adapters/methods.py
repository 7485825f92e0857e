"""From the recipe's `adapter` section to a model whose adapter trains.

METHODS                     method -> function(model, section) -> PeftConfig; a new PEFT method is one row
check(model, section)       everything the targets can be wrong in, on a model without weights
apply(model, section, …)    the model with a fresh adapter; trainables in float32
save(model, folder)         the adapter as any tool loads it onto the original base
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TaskType,
    VeraConfig,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.adapters import lora_init, soft_prompts
from finetune.adapters.adalora import UNKNOWN
from finetune.adapters.targets import (
    MLP_OUT,
    find,
    head_name,
    is_adaptable,
    is_linear,
    is_norm,
    keys_values_and_mlp,
    norms,
    sublayers,
)
from finetune.adapters.tuners.bitfit import BitFitConfig, targets_of
from finetune.adapters.tuners.bottleneck import BottleneckConfig
from finetune.adapters.tuners.last_layers import LastLayersConfig, modules_of
from finetune.errors import UserError
from finetune.recipe.adapters import Adapter, FullAdapter

CAUSAL = TaskType.CAUSAL_LM


def lora(model: Any, section: Any) -> PeftConfig:
    values = section.model_dump(exclude={"method", "loraplus_lr_ratio", "init_lora_weights"})
    init = section.init_lora_weights
    if init in lora_init.REWRITING:
        check_rank(model, section)
    return LoraConfig(
        task_type=CAUSAL, bias="none", init_lora_weights=lora_init.PEFT_NAMES.get(init, init), **targets(model, values)
    )


def adalora(model: Any, section: Any) -> PeftConfig:
    values = targets(model, section.model_dump(exclude={"method", "tinit", "tfinal"}))
    return AdaLoraConfig(task_type=CAUSAL, bias="none", total_step=UNKNOWN, **values)


def plain(config: Callable[..., PeftConfig]) -> Callable[[Any, Any], PeftConfig]:
    """Methods whose recipe keys are peft's."""
    return lambda model, section: config(task_type=CAUSAL, **targets(model, section.model_dump(exclude={"method"})))


def targets(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The same values; UserError for names that match nothing. peft knows what all-linear is, on every family."""
    names = find(model, values["target_modules"], accept=is_adaptable)
    head = model.get_output_embeddings()
    if any(model.get_submodule(name) is head for name in names):
        # trl computes log-probabilities from the head's weight, past any adapter on it.
        raise UserError(
            "an adapter on the output head would never be trained", key="adapter.target_modules",
            fix=f"leave it out, or train it whole: adapter.modules_to_save: [{head_name(model)}]",
        )  # fmt: skip
    if values.get("modules_to_save"):
        find(model, values["modules_to_save"], "adapter.modules_to_save")
    return values


def check_rank(model: Any, section: Any) -> None:
    """A start made of singular vectors has no more of them than the smaller side of a weight."""
    for name in find(model, section.target_modules, accept=is_adaptable):
        smaller = min(model.get_submodule(name).weight.shape)
        if section.r > smaller:
            what = f"{section.init_lora_weights} has only {smaller} ranks to start from in {name}"
            raise UserError(what, key="adapter.r", fix=f"at most {smaller}, or other target_modules")


def oft(model: Any, section: Any) -> PeftConfig:
    for name in find(model, section.target_modules, accept=is_adaptable):
        width = model.get_submodule(name).weight.shape[-1]
        if width % section.oft_block_size:  # peft would silently take another size
            what = f"does not divide {width}, the input size of {name}"
            raise UserError(what, key="adapter.oft_block_size", fix=f"for example {math.gcd(width, 32)}")
    return plain(OFTConfig)(model, section)


def bottleneck(model: Any, section: Any) -> PeftConfig:
    sublayers(model)
    return BottleneckConfig(task_type=CAUSAL, **section.model_dump(exclude={"method"}))


def ia3(model: Any, section: Any) -> PeftConfig:
    if section.target_modules is None:
        if section.feedforward_modules is not None:
            what = "are those of target_modules whose input is rescaled"
            raise UserError(what, key="adapter.feedforward_modules", fix="give target_modules, too")
        attention, mlp = keys_values_and_mlp(model)
    else:
        mlp = section.feedforward_modules
        if mlp is None:
            mlp = [name for name in section.target_modules if name.rpartition(".")[2] in MLP_OUT]
        find(model, section.target_modules, accept=is_linear)
        if mlp:
            find(model, mlp, "adapter.feedforward_modules", accept=is_linear)
        attention = [name for name in section.target_modules if name not in mlp]
    return IA3Config(task_type=CAUSAL, target_modules=attention + mlp, feedforward_modules=mlp)


def bitfit(model: Any, section: Any) -> PeftConfig:
    return BitFitConfig(task_type=CAUSAL, target_modules=targets_of(model, section))


def last_layers(model: Any, section: Any) -> PeftConfig:
    modules_of(model, section.num_layers, section.norm)
    return LastLayersConfig(
        task_type=CAUSAL,
        num_layers=section.num_layers,
        norm=section.norm,
        modules_to_save=[head_name(model)] if section.head else None,
    )


def ln_tuning(model: Any, section: Any) -> PeftConfig:
    names = norms(model) if section.target_modules is None else find(model, section.target_modules, accept=is_norm)
    return LNTuningConfig(task_type=CAUSAL, target_modules=names)


METHODS: dict[str, Callable[[Any, Any], PeftConfig]] = {
    "lora": lora,
    "adalora": adalora,
    "vera": plain(VeraConfig),
    "oft": oft,
    "loha": plain(LoHaConfig),
    "lokr": plain(LoKrConfig),
    "bottleneck": bottleneck,
    "ia3": ia3,
    "prompt_tuning": soft_prompts.prompt_tuning,
    "p_tuning": soft_prompts.p_tuning,
    "prefix_tuning": soft_prompts.prefix_tuning,
    "bitfit": bitfit,
    "last_layers": last_layers,
    "ln_tuning": ln_tuning,
}


def check(model: torch.nn.Module, section: Adapter, quantized: bool = False) -> None:
    """UserError for targets that are not there; `model` may be without weights (on torch's meta device).

    Args:
        quantized: whether its linear layers will be held as integers.
    """
    if isinstance(section, FullAdapter):
        return
    METHODS[section.method](model, section)
    whole = getattr(section, "modules_to_save", None)
    if quantized and whole:
        head = model.get_output_embeddings()  # type: ignore[operator]  # it keeps its precision
        for name in find(model, whole, "adapter.modules_to_save"):
            if any(is_linear(m) and m is not head for m in model.get_submodule(name).modules()):
                raise UserError(
                    f"{name} is held as integers here, which have no gradient: it cannot be trained whole",
                    key="adapter.modules_to_save", fix="leave it out, or model.quantization",
                )  # fmt: skip


def check_targets(model: torch.nn.Module, adapted: Any, section: Adapter, folder: Path) -> None:
    """UserError where a recipe names other targets than those of the adapter that it trains on.

    Args:
        model: the base without weights, adapted: the same with the adapter of `folder` on it.
    """
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
