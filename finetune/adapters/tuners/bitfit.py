"""BitFit: train biases only (Ben Zaken et al. 2022, arXiv:2106.10199), a tuner that peft knows by the name BITFIT.

    bias: existing    every bias that the base has, of linear layers and norms
    bias: add         a zero bias on linear layers without one, too

The trained tensor is the change of the bias, added to the layer's output: the same function and the same gradient as
the bias itself, while the base stays as it is and quantized layers need no care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.peft_types import register_peft_method
from torch import nn

from finetune.adapters.targets import find, is_linear, is_norm, linears, of_text
from finetune.adapters.tuners.base import Tuner, TunerConfig, WrappedLayer, add_type
from finetune.errors import UserError
from finetune.families import family
from finetune.recipe.adapters import BitFitAdapter


@dataclass
class BitFitConfig(TunerConfig):
    kind = add_type("bitfit")


class BitFitLayer(WrappedLayer):
    """A linear layer or norm with a trainable change of its bias."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BitFitConfig) -> None:
        super().__init__(base_layer, adapter_name, config, bitfit_bias=nn.ParameterDict())

    def update_layer(self, adapter_name: str, config: BitFitConfig) -> None:
        self.bitfit_bias[adapter_name] = nn.Parameter(torch.zeros(width(self.get_base_layer())))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.bitfit_bias:
                out = out + self.bitfit_bias[name].to(out.dtype)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into the layer's own bias, which is made where there is none; `fill_bias_slots` makes that storable."""
        base = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            change = self.bitfit_bias[name].data
            if base.bias is None:
                base.bias = empty_bias(base)
            base.bias.data = (base.bias.data.to(change.dtype) + change).to(base.bias.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        base = self.get_base_layer()
        while self.merged_adapters:
            change = self.bitfit_bias[self.merged_adapters.pop()].data
            base.bias.data = (base.bias.data.to(change.dtype) - change).to(base.bias.dtype)


def width(layer: Any) -> int:
    """Length of the layer's bias."""
    for name in ("out_features", "nf"):  # Linear, Conv1D
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(layer.weight.shape[-1])


def empty_bias(layer: Any) -> nn.Parameter:
    weight = layer.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return nn.Parameter(torch.zeros(width(layer), dtype=dtype, device=weight.device), requires_grad=False)


class BitFitModel(Tuner):
    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def choose(self, model: Any, config: BitFitConfig) -> list[str]:
        return with_bias(model)


def has_bias(module: Any) -> bool:
    return (is_linear(module) or is_norm(module)) and getattr(module, "bias", None) is not None


def with_bias(model: Any) -> list[str]:
    """Full names of the linear layers and norms that have a bias."""
    return [name for name, module in of_text(model) if has_bias(module)]


def storable(model: Any) -> list[str]:
    """Full names of the linear layers whose bias the model's own checkpoint format can hold."""
    names = family(model.config.model_type).biased
    return [name for name in linears(model) if name.rpartition(".")[2] in names]


def targets_of(model: Any, section: BitFitAdapter) -> list[str]:
    """Full names of the modules whose biases are trained. UserError when there are none."""
    existing = with_bias(model)
    if section.bias == "existing":
        if not existing:
            raise UserError("this base has no biases to train", key="adapter.bias", fix="set adapter.bias: add")
        if isinstance(section.targets, list):
            return find(model, section.targets, "adapter.targets", accept=has_bias)
        return existing
    if isinstance(section.targets, list):
        return find(model, section.targets, "adapter.targets", accept=lambda m: is_linear(m) or has_bias(m))
    if section.targets == "all":
        return sorted({*existing, *linears(model)})
    names = sorted({*existing, *storable(model)})
    if not names:
        kind = model.config.model_type
        raise UserError(
            f"{kind} models have no biases, and their checkpoints no place for any", key="adapter.targets",
            fix="set adapter.targets: all (it cannot be merged then)",
        )  # fmt: skip
    return names


def fill_bias_slots(model: Any) -> None:
    """After merging: every layer of a group gets a bias (of zero) when one has it, and the config's flag is set."""
    modules = {name: module for name, module in model.named_modules() if is_linear(module)}
    for flag, group in family(model.config.model_type).bias_slots.items():
        members = [m for name, m in modules.items() if name.rpartition(".")[2] in group]
        if any(m.bias is not None for m in members) and not (flag and getattr(model.config, flag, False)):
            if flag:  # qwen2 has none: its biases are always there
                setattr(model.config, flag, True)
            for module in members:
                if module.bias is None:
                    module.bias = empty_bias(module)


register_peft_method(name="bitfit", config_cls=BitFitConfig, model_cls=BitFitModel)
