"""From a recipe's `adapter` section to peft's config: one function (model, section) -> PeftConfig for each method.

UserError for everything that the targets can be wrong in; `model` may be without weights (on torch's meta device).
peft is imported when a config is made: the rows in `methods`, which name these functions, are read without torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.adapters import targets
from finetune.adapters.targets import find, head_name, is_adaptable, is_linear
from finetune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

CAUSAL: Any = "CAUSAL_LM"


def lora(model: Any, section: Any) -> PeftConfig:
    from peft import LoraConfig

    from finetune.adapters.lora_init import PEFT_NAMES, rewrites_base
    from finetune.models.quantization import for_experts

    values = section.model_dump(exclude={"method", "loraplus_lr_ratio", "init_lora_weights"})
    init = section.init_lora_weights
    if rewrites_base(section):
        check_rank(model, section)
    config = LoraConfig(
        task_type=CAUSAL, bias="none", init_lora_weights=PEFT_NAMES.get(init, init), **with_targets(model, values)
    )
    check_experts(model, section, config)
    return for_experts(config, model)


def plain(name: str, *left_out: str, **more: Any) -> Callable[[Any, Any], PeftConfig]:
    """Methods whose recipe keys, but for those left out, are those of peft's class `name`."""

    def make(model: Any, section: Any) -> PeftConfig:
        import peft

        values = section.model_dump(exclude={"method", *left_out})
        if "target_modules" in values:
            with_targets(model, values)
        config: PeftConfig = getattr(peft, name)(task_type=CAUSAL, **more, **values)
        return config

    return make


def with_targets(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The same values; UserError for names that match nothing. peft knows what all-linear is, on every family."""
    names = find(model, values["target_modules"], accept=is_adaptable)
    passed = targets.passed_over(model)
    if lost := sorted({*names} & {*passed}):
        raise UserError(
            f"an adapter on {lost[0]} would be passed over: what it computes is no product with its weight",
            key="adapter.target_modules", fix="leave it out, or use all-linear",
        )  # fmt: skip
    if passed:
        values["exclude_modules"] = targets.as_pattern(passed)
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


def check_experts(model: Any, section: Any, config: PeftConfig) -> None:
    """UserError for what peft cannot do with the experts of a mixture, where it finds them among the targets."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    found = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(found, model, None)
    except ValueError as error:
        raise UserError(str(error), key="adapter.target_modules", fix="name all three, or none of them") from None
    if not getattr(found, "target_parameters", None):
        return
    plain = ("default", "gaussian")
    for key, wrong in (("lora_dropout", section.lora_dropout > 0), ("use_dora", section.use_dora),
                       ("init_lora_weights", section.init_lora_weights not in plain)):  # fmt: skip
        if wrong:
            what = "the experts are among the targets, and peft can do this with a linear layer only, not with them"
            raise UserError(what, key=f"adapter.{key}", fix="leave it out, or name adapter.target_modules: [q_proj, …]")


def oft(model: Any, section: Any) -> PeftConfig:
    for name in find(model, section.target_modules, accept=is_adaptable):
        width = model.get_submodule(name).weight.shape[-1]
        if width % section.oft_block_size:  # peft would silently take another size
            what = f"does not divide {width}, the input size of {name}"
            raise UserError(what, key="adapter.oft_block_size", fix=f"for example {math.gcd(width, 32)}")
    return plain("OFTConfig")(model, section)


def bottleneck(model: Any, section: Any) -> PeftConfig:
    from finetune.adapters.tuners.bottleneck import BottleneckConfig

    targets.sublayers(model)
    return BottleneckConfig(task_type=CAUSAL, **section.model_dump(exclude={"method"}))


def ia3(model: Any, section: Any) -> PeftConfig:
    from peft import IA3Config

    if section.target_modules is None:
        if section.feedforward_modules is not None:
            what = "are those of target_modules whose input is rescaled"
            raise UserError(what, key="adapter.feedforward_modules", fix="give target_modules, too")
        attention, mlp = targets.keys_values_and_mlp(model)
    else:
        mlp = section.feedforward_modules
        if mlp is None:
            mlp = [name for name in section.target_modules if name.rpartition(".")[2] in targets.MLP_OUT]
        find(model, section.target_modules, accept=is_linear)
        if mlp:
            find(model, mlp, "adapter.feedforward_modules", accept=is_linear)
        attention = [name for name in section.target_modules if name not in mlp]
    away = targets.towers(model)
    return IA3Config(
        task_type=CAUSAL, target_modules=attention + mlp, feedforward_modules=mlp,
        exclude_modules=targets.as_pattern(away) if away else None,
    )  # fmt: skip


def bitfit(model: Any, section: Any) -> PeftConfig:
    from finetune.adapters.tuners.bitfit import BitFitConfig, targets_of

    return BitFitConfig(task_type=CAUSAL, target_modules=targets_of(model, section))


def last_layers(model: Any, section: Any) -> PeftConfig:
    from finetune.adapters.tuners.last_layers import LastLayersConfig, modules_of

    modules_of(model, section.num_layers, section.norm)
    return LastLayersConfig(
        task_type=CAUSAL,
        num_layers=section.num_layers,
        norm=section.norm,
        modules_to_save=[head_name(model)] if section.head else None,
    )


def ln_tuning(model: Any, section: Any) -> PeftConfig:
    from peft import LNTuningConfig

    given = section.target_modules
    names = targets.norms(model) if given is None else find(model, given, accept=targets.is_norm)
    return LNTuningConfig(task_type=CAUSAL, target_modules=names)
