"""Bottleneck adapters: h <- h + s * W_up f(W_down x), a tuner that peft knows by the name BOTTLENECK.

    houlsby     x = h, after attention and after the MLP      (Houlsby et al. 2019, arXiv:1902.00751, figure 2)
    pfeiffer    x = h, after the MLP only                     (Pfeiffer et al. 2020, arXiv:2005.00247, section 3)
    parallel    x = the MLP's input, beside the MLP           (He et al. 2021, arXiv:2110.04366, equation 8)

W_up starts as zero, so a fresh adapter computes what the base computes. Non-linear, hence never merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.peft_types import register_peft_method
from torch import nn
from transformers.activations import ACT2FN

from finetune.adapters.targets import sublayers
from finetune.adapters.tuners.base import Tuner, TunerConfig, WrappedLayer, add_type

VARIANTS = ("houlsby", "pfeiffer", "parallel")


@dataclass
class BottleneckConfig(TunerConfig):
    kind = add_type("bottleneck")
    variant: str = field(default="houlsby")
    bottleneck_size: int = field(default=64)
    non_linearity: str = field(default="gelu")
    scaling: float = field(default=1.0)
    bottleneck_dropout: float = field(default=0.0)
    hidden_size: int | None = field(default=None)
    """The model's; filled in when the adapter is built."""
    init_weights: bool = field(default=True)
    """Start as the base; False starts W_up at random (for tests)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant {self.variant!r} is none of {', '.join(VARIANTS)}")


class BottleneckLayer(WrappedLayer):
    """Any module from hidden states to hidden states (a projection or a whole MLP), with adapters on or beside it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        own = {"bottleneck_down": nn.ModuleDict(), "bottleneck_up": nn.ModuleDict(), "bottleneck_settings": {}}
        super().__init__(base_layer, adapter_name, config, **own)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        down = nn.Linear(config.hidden_size, config.bottleneck_size)  # type: ignore[arg-type]
        up = nn.Linear(config.bottleneck_size, config.hidden_size)  # type: ignore[arg-type]
        nn.init.normal_(down.weight, std=0.02)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_settings[adapter_name] = config
        device = next(self.base_layer.parameters()).device  # an MLP has no `weight` to ask
        self._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("bottleneck adapters are non-linear and cannot be merged")

    def unmerge(self) -> None:
        raise ValueError("bottleneck adapters are never merged")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return out
        if isinstance(out, tuple):  # the experts of some families return what their router said, too
            return (self.added(x, out[0]), *out[1:])
        return self.added(x, out)

    def added(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result = out
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                config, down, up = self.bottleneck_settings[name], self.bottleneck_down[name], self.bottleneck_up[name]
                h = x if config.variant == "parallel" else out
                h = self._cast_input_dtype(h, down.weight.dtype)
                h = nn.functional.dropout(h, config.bottleneck_dropout, self.training)
                result = result + (config.scaling * up(ACT2FN[config.non_linearity](down(h)))).to(out.dtype)
        return result


class BottleneckModel(Tuner):
    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def choose(self, model: Any, config: BottleneckConfig) -> list[str]:
        places = sublayers(model)
        attention = [name for name, _ in places] if config.variant == "houlsby" else []
        return [*attention, *(mlp for _, mlp in places)]

    def _pre_injection_hook(self, model: Any, config: BottleneckConfig, adapter_name: str) -> None:
        config.hidden_size = config.hidden_size or model.config.get_text_config().hidden_size
        super()._pre_injection_hook(model, config, adapter_name)


register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
