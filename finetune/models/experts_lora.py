"""LoRA on experts in 4 bits.

peft's `ParamWrapper` adds the update to the weight itself while it computes. On a weight that bitsandbytes unpacks by
a parametrization of its own this goes wrong in peft 0.21 (`_remove_parametrizations` looks for `_LoraParameterProxy`,
and `_LoraFactorsProxy` stays: after every forward pass the update counts once more), and the gradient would be as
large as all the weights. Here the update is computed beside the weight, from the same A and B under the same names:
such an adapter goes onto the base in any precision, and one from there onto this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import layer
from torch import nn

from finetune.models.experts import Experts4bit, Update


class ParamWrapper(layer.ParamWrapper):
    """By the name of its parent, by which peft knows it."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        shape = self.get_base_layer().shapes[self.parameter_name]
        self.num_experts, inside, outside = shape
        self._param_ndim = len(shape)
        return inside, outside

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        updates = self.get_base_layer().updates
        updates[self.parameter_name] = [self.update(name) for name in active_adapters if name in self.lora_A]
        try:
            yield
        finally:
            del updates[self.parameter_name]

    def update(self, adapter: str) -> Update:
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        count = self.num_experts
        down = down.reshape(count, -1, down.shape[-1])
        up = up.reshape(up.shape[0], -1, count).permute(2, 0, 1).contiguous()
        return Update(down, up, self.scaling[adapter])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise RuntimeError("nothing is merged into 4-bit weights: dequantize() them first")


def on_experts(target: nn.Module, adapter: str, parameter_name: str | None = None, **more: Any) -> nn.Module | None:
    """The layer for peft to put on `target`; None leaves the choice to peft."""
    base: Any = target.get_base_layer() if isinstance(target, layer.LoraLayer) else target
    if parameter_name in base.shapes:
        return ParamWrapper(target, adapter, parameter_name=parameter_name, **more)
    return None


def register(config: Any) -> None:
    """Let peft ask `on_experts` when it puts an adapter of this config on a model."""
    config._register_custom_module({Experts4bit: on_experts})
