"""Train the last blocks whole: a tuner that peft knows by the name LAST_LAYERS.

Every module of those blocks that holds weights gets a trainable float32 copy, and the copy computes in its place. The
base stays as it is: the adapter can be switched off, is as small as the blocks, and quantized blocks are trained as
what they stand for. Merging puts the copies in.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.peft_types import register_peft_method
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from finetune.adapters.targets import blocks, final_norm, leaves_with_weights
from finetune.adapters.tuners.base import Tuner, TunerConfig, WrappedLayer, add_type
from finetune.errors import UserError


@dataclass
class LastLayersConfig(TunerConfig):
    kind = add_type("last_layers")
    num_layers: int = field(default=2)
    norm: bool = field(default=True)


def trainable_copy(module: nn.Module) -> nn.Module:
    """A float32 copy; of a quantized linear layer, a plain one with the weights it stands for."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and weight is not None and not weight.is_floating_point():
        with torch.device(weight.device):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        # Not peft's dequantize_module_weight: on CPUs it leaves an int8 layer without its scales.
        plain.weight.data = dequantize_bnb_weight(weight, state=getattr(module, "state", None)).float()
        if module.bias is not None:
            plain.bias.data = module.bias.data.to(torch.float32, copy=True)  # never the base's own storage
        return plain
    return copy.deepcopy(module).float().requires_grad_(True)


def in_dtype(values: Any, dtype: torch.dtype) -> Any:
    """The same with all floating-point tensors in `dtype`; routers and attention take and give several things."""
    return tree_map(lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, values)


class LastLayersLayer(WrappedLayer):
    """A module with a trainable copy that stands in for it."""

    adapter_layer_names = ("last_layers_copy",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LastLayersConfig) -> None:
        super().__init__(base_layer, adapter_name, config, last_layers_copy=nn.ModuleDict())

    def update_layer(self, adapter_name: str, config: LastLayersConfig) -> None:
        self.last_layers_copy[adapter_name] = trainable_copy(self.get_base_layer())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = [name for name in self.active_adapters if name in self.last_layers_copy]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        module = self.last_layers_copy[active[-1]]
        given = next(x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x))
        if torch.is_autocast_enabled(given.device.type):
            return module(*args, **kwargs)
        # Outside of training's autocast: float32 inside, the base's precision outside.
        args, kwargs = in_dtype((args, kwargs), next(module.parameters()).dtype)
        return in_dtype(module(*args, **kwargs), given.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            base, trained = self.get_base_layer(), self.last_layers_copy[name]
            for key, value in trained.named_parameters():
                own = base.get_parameter(key)
                own.data = value.data.to(own.dtype)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        raise ValueError("the last layers were replaced; load the base again")


class LastLayersModel(Tuner):
    prefix = "last_layers_"
    tuner_layer_cls = LastLayersLayer

    def choose(self, model: Any, config: LastLayersConfig) -> list[str]:
        return modules_of(model, config.num_layers, config.norm)


def modules_of(model: nn.Module, num_layers: int, norm: bool) -> list[str]:
    """Full names of the modules with weights in the last blocks. UserError when there are not that many."""
    found = blocks(model)
    if num_layers > len(found):
        raise UserError(
            f"{num_layers} blocks of {len(found)}", key="adapter.num_layers",
            fix=f"at most {len(found)}, or adapter.method: full",
        )  # fmt: skip
    names = [leaf for name, block in found[-num_layers:] for leaf in leaves_with_weights(block, name)]
    return [*names, final_norm(model)] if norm else names


register_peft_method(name="last_layers", config_cls=LastLayersConfig, model_cls=LastLayersModel)
