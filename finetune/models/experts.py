"""Mixture-of-experts in 4 bits: what transformers and bitsandbytes lack for it.

transformers 5 keeps the experts of a layer in two parameters [experts, out, in] (or [experts, in, out]), and
bitsandbytes quantizes linear layers only. Here they are quantized like those, in blocks of 64 weights, layer by layer
while they are read. Computing unpacks the experts that tokens were sent to, a group of them at a time, and nothing of
it is kept for the backward pass, which unpacks them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor, nn
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import _grouped_linear as grouped_linear
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationMethod

METHOD = "bitsandbytes_4bit_with_experts"
"""Name of `Quantizer` among those of transformers; models say bitsandbytes, as ever."""
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
BLOCK = 64  # weights that share a scale
RANKS = 8  # torch's grouped_mm takes rows of whole 16 bytes
AT_ONCE = 1 << 28  # weights that are unpacked at a time: 0.5 GB in bfloat16


def expert_weights(module: nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of the 3-D weights, if `module` holds experts that compute as transformers' interface for them
    (`use_experts_implementation`) says. Empty for all others."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return {}
    own = {name: p.shape for name, p in module.named_parameters(recurse=False) if name in WEIGHTS and p.ndim == 3}
    whole = all(shape[1] * shape[2] % BLOCK == 0 for shape in own.values())
    return own if whole else {}


class Experts4bit(nn.Module):
    """Mixed in before a class of experts, whose weights are then `Params4bit`."""

    shapes: dict[str, torch.Size]
    """Of the weights, as they stand for."""
    updates: dict[str, list[Update]]
    """What adapters add to a weight while they compute."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k]."""
        this: Any = self  # flags and functions of the class that this is mixed into
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1))
        counts = torch.bincount(experts, minlength=this.num_experts)
        x = hidden_states[order // k]
        if this.has_gate:
            x = this._apply_gate(self.project("gate_up_proj", x, experts, counts))
        else:
            x = this.act_fn(self.project("up_proj", x, experts, counts))
        x = self.project("down_proj", x, experts, counts)
        if this.has_post_expert_norm:
            x = this.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        return x[order.argsort()].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def project(self, name: str, x: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
        """One weight of every expert, times its rows of x.

        Args:
            x: [rows, in], in the order of their experts; experts: [rows]; counts: rows of each expert.
        """
        this: Any = self
        weight = getattr(self, name)
        x = x.to(weight.quant_state.dtype)
        out: Tensor = Product.apply(x, weight, counts.tolist(), this.is_transposed)
        if this.has_bias:
            out = out + getattr(self, f"{name}_bias")[experts]
        ends = counts.cumsum(0, dtype=torch.int32)
        for update in self.updates.get(name, ()):
            out = out + update(x, ends)
        return out


@dataclass(frozen=True)
class Update:
    """Of a low rank, each expert's own."""

    down: Tensor
    """[experts, rank, in]"""
    up: Tensor
    """[experts, out, rank]"""
    scale: float

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        """ends: the row behind each expert's last one."""
        more = -self.down.shape[1] % RANKS  # of zeros
        down, up = nn.functional.pad(self.down, (0, 0, 0, more)), nn.functional.pad(self.up, (0, more))
        low = grouped_linear(x, down.to(x.dtype), ends)
        return grouped_linear(low, up.to(x.dtype), ends) * self.scale


class Product(torch.autograd.Function):
    """Rows times the weights of their experts; those have no gradient. Kept for backward: the packed weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, counts: list[int], transposed: bool) -> Tensor:
        ctx.weight, ctx.counts, ctx.transposed = weight, counts, transposed
        return product(x, weight, counts, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return product(grads[0].contiguous(), ctx.weight, ctx.counts, not ctx.transposed), None, None, None


def product(x: Tensor, weight: Any, counts: list[int], transposed: bool) -> Tensor:
    """Group by group, so that no more than AT_ONCE weights are unpacked."""
    _, first, second = weight.quant_state.shape
    hit = [expert for expert, rows in enumerate(counts) if rows]
    out = x.new_empty(len(x), second if transposed else first)
    size = max(1, AT_ONCE // (first * second))
    start = 0
    for group in (hit[i : i + size] for i in range(0, len(hit), size)):
        end = start + sum(counts[expert] for expert in group)
        ends = torch.tensor([counts[expert] for expert in group], device=x.device).cumsum(0, dtype=torch.int32)
        unpacked = dequantized(weight, group).to(x.dtype)
        out[start:end] = grouped_linear(x[start:end], unpacked, ends, is_transposed=transposed)
        start = end
    return out


@torch.no_grad()
def quantized(weight: Tensor, kind: str, nested: bool) -> Any:
    """A stack of matrices [experts, …] in 4 bits, as bitsandbytes makes it; matrix by matrix, as it takes several times
    the memory of what it quantizes.

    Args:
        kind: nf4 or fp4; nested: whether the scales are quantized, too.
    """
    packed, states = zip(*(quantize_4bit(matrix, blocksize=BLOCK, quant_type=kind) for matrix in weight), strict=True)
    scales, rest = torch.cat([state.absmax for state in states]), {}
    if nested:
        offset = scales.mean()
        scales, second = quantize_blockwise(scales - offset, blocksize=256)
        rest = {"offset": offset, "state2": second}
    state = QuantState(scales, weight.shape, states[0].code, BLOCK, kind, weight.dtype, **rest)
    return bnb.nn.Params4bit(
        torch.cat(packed), requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=nested,
        quant_type=kind, bnb_quantized=True,
    )  # fmt: skip


def dequantized(weight: Any, experts: list[int]) -> Tensor:
    """What the packed weights of these experts stand for."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    count, *matrix = state.shape
    chosen = torch.tensor(experts, device=weight.device)
    packed, scales = (t.view(count, -1)[chosen].reshape(-1) for t in (weight.data, scales.float()))
    # A block a row: on CPUs bitsandbytes 0.50 mistakes the scales of matrices whose rows are no whole number of blocks.
    rows = torch.Size([len(scales), state.blocksize])
    part = QuantState(scales, rows, state.code, state.blocksize, state.quant_type, state.dtype)
    return dequantize_4bit(packed.unsqueeze(1), part).view(len(experts), *matrix)


@cache
def mixed(kind: Any) -> type[nn.Module]:
    """The class `kind` of experts, computing with packed weights."""
    return type(f"{kind.__name__}4bit", (Experts4bit, kind), {"__module__": __name__, "plain": kind})


def make_4bit(module: nn.Module) -> None:
    """Let experts whose weights are not there yet (on torch's meta device) expect them in 4 bits."""
    module.shapes, module.updates = expert_weights(module), {}  # type: ignore[assignment]
    kind: Any = type(module)
    module.__class__ = mixed(kind)


@torch.no_grad()
def make_plain(module: Any, dtype: torch.dtype | None) -> None:
    """The reverse: experts with the weights that the packed ones stand for."""
    for name in module.shapes:
        weight = getattr(module, name)
        unpacked = dequantized(weight, [*range(weight.quant_state.shape[0])])
        setattr(module, name, nn.Parameter(unpacked.to(dtype or unpacked.dtype), requires_grad=False))
    del module.shapes, module.updates
    module.__class__ = module.plain


class Quantize(Bnb4bitQuantize):
    """Of transformers' loader: what becomes of weights that have just been read."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **more: Any
    ) -> dict[str, Any]:
        found = {}
        for name, value in input_dict.items():
            if isinstance(get_module_from_name(model, name)[0], Experts4bit):
                config = self.hf_quantizer.quantization_config
                weight = value[0] if isinstance(value, list) else value
                found[name] = quantized(weight, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            else:
                found |= super().convert({name: value}, full_layer_name=full_layer_name, model=model, **more)
        return found


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' 4 bits for linear layers, as transformers has it, and for experts."""

    experts = False

    def __init__(self, quantization_config: Any, **more: Any) -> None:
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        super().__init__(quantization_config, **more)

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **more: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **more)
        for module in [module for module in model.modules() if expert_weights(module)]:
            make_4bit(module)
            self.experts = True

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Experts4bit):
            return name in module.shapes
        return bool(super().param_needs_quantization(model, param_name, **more))

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    def is_serializable(self) -> bool:
        return not self.experts  # there is no format for them that anything reads

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in [module for module in model.modules() if isinstance(module, Experts4bit)]:
            make_plain(module, dtype)
        return super()._dequantize(model, dtype=dtype)
