"""Merging an adapter into its base's weights, and what proves that the result is base + adapter.

Beside the model itself nothing here holds more than one layer, in float64 at most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from finetune.adapters.tuners.bitfit import empty_bias, fill_bias_slots
from finetune.errors import RunError, UserError
from finetune.families import family

# What the float32 sum of a layer may miss: this share of what the adapter does to the layer's output, …
OF_THE_EFFECT = 1e-3
# … and this share of the output, which float32 rounds away from any sum.
OF_THE_OUTPUT = 1e-6

Call = tuple[tuple[Any, ...], dict[str, Any]]
WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def check_layers(adapted: Any, folder: Path) -> None:
    """UserError for layers whose adapter can never be added to the base's weights.

    Args:
        adapted: the adapter on a network without weights.
    """
    fix = "use it as it is: ft eval, ft chat and peft load it onto the base"
    kind = adapted.peft_config["default"].peft_type.value
    model_type = adapted.get_base_model().config.model_type
    slots = family(model_type).biased
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and type(module).merge is BaseTunerLayer.merge:
            what = f"{kind.lower()} cannot be merged: peft has no sum of it and a weight"
            raise UserError(what, path=folder, key="--adapter", fix=fix)
        if lacks_bias(module) and name.rpartition(".")[2] not in slots:
            what = f"has a bias (lora_bias) on {name}, where {model_type} checkpoints have no place for one"
            raise UserError(what, path=folder, key="--adapter", fix=fix)


def lacks_bias(module: Any) -> bool:
    """A LoRA layer with a bias of its own, on a layer that has none to add it to."""
    return any(getattr(module, "lora_bias", {}).values()) and module.get_base_layer().bias is None


@dataclass(frozen=True)
class Sums:
    """The merged model before it is made: what each of its tensors must be."""

    digests: dict[str, str]
    """Name -> digest of the tensor, rounded once."""
    layers: int
    largest_miss: float
    """Over the layers that the adapter changes: what the sum misses, relative to what the adapter does."""


def adapted_layers(model: Any) -> dict[str, Any]:
    """Name in the base -> layer with something of the adapter on it; the outermost ones."""
    found: dict[str, Any] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, WRAPPERS) and not inside(name, found):
            found[name] = module
    return found


def inside(name: str, layers: Mapping[str, Any]) -> bool:
    """Whether something of this name lies in one of the layers."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in layers for n in range(1, len(parts)))


def summed(layer: Any) -> torch.nn.Module:
    """The plain layer that base and adapter make together, in float32. `layer` stays as it is."""
    trial = copy.deepcopy(layer).float()
    if isinstance(trial, AuxiliaryTrainingWrapper):
        plain: torch.nn.Module = trial.unload_and_optionally_merge_module(True, True, None)
        return plain
    for module in list(trial.modules()):
        if lacks_bias(module):
            module.get_base_layer().bias = empty_bias(module.get_base_layer())
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    return trial.get_base_layer()


@torch.no_grad()
def merge_in_float32(model: Any) -> PreTrainedModel:
    """The base with the adapter added into it.

    Layer by layer the sum is formed in float32 and rounded once to the weights' own dtype; peft adds in the weights'
    dtype, which rounds the update and the sum. Memory stays at one copy of the model.
    """
    base = model.get_base_model()
    dtype = base.dtype
    for name, layer in adapted_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, summed(layer).to(dtype))
    merged: PreTrainedModel = model.unload()  # nothing is left to take off but peft's own marks
    settle_ties(merged)
    fill_bias_slots(merged)
    return merged.eval()


def settle_ties(model: Any) -> None:
    """config.json says that input and output embeddings are one matrix only where they still are."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    text = model.config.get_text_config()
    if head is None or not getattr(text, "tie_word_embeddings", False) or head.weight is table.weight:
        return
    if torch.equal(head.weight, table.weight):
        head.weight = table.weight
    else:
        model.config.tie_word_embeddings = text.tie_word_embeddings = False


@torch.inference_mode()
def inputs_of(model: Any, ids: list[int]) -> dict[str, Call]:
    """What each adapted layer is given when the model reads `ids`."""
    calls: dict[str, Call] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    handles = [
        layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in adapted_layers(model).items()
    ]
    try:
        logits_of(model, [ids])
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def prove_sums(
    model: Any, inputs: Mapping[str, Call], dtype: torch.dtype, advance: Callable[[int], None] = lambda n: None
) -> Sums:
    """What every tensor of the merged model is in `dtype`: of adapted layers their sum in float32, after proof that it
    computes what base and adapter compute in float64; of all others the base's own.

    RunError for a layer whose sum misses more than float32 rounds; UserError for an adapter that is not all numbers.

    Args:
        inputs: of `inputs_of`; advance: told of every layer.
    """
    layers = adapted_layers(model)
    digests = {
        name: digest(finite(name, tensor, dtype))
        for name, tensor in model.get_base_model().state_dict().items()
        if not inside(name, layers)
    }
    largest = 0.0
    for name, layer in layers.items():
        advance(1)
        for key, tensor in layer.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(
                    f"holds values that are no numbers ({name}.{key})", key="--adapter",
                    fix="train it again with a lower learning rate, or take an earlier checkpoint",
                )  # fmt: skip
        plain = summed(layer)
        for key, tensor in plain.state_dict().items():
            digests[f"{name}.{key}"] = digest(finite(f"{name}.{key}", tensor, dtype))
        miss, effect, size = compared(layer, plain, inputs.get(name) or made_up(plain))
        if not miss <= OF_THE_EFFECT * effect + OF_THE_OUTPUT * size:
            raise RunError(
                f"the merged model differs from base + adapter: in {name} by {miss:.3g}, where the adapter changes the "
                f"output by {effect:.3g}; nothing was written"
            )
        largest = max(largest, miss / effect if effect > OF_THE_OUTPUT * size else 0.0)
    return Sums(digests, len(layers), largest)


def compared(layer: Any, plain: torch.nn.Module, call: Call) -> tuple[float, float, float]:
    """Largest absolute values in the layer's output, computed in float64: of what `plain` misses of base + adapter, of
    what the adapter changes, and of the output itself. Turns `plain` into float64."""
    args, kwargs = tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, call)
    exact = in_float64(copy.deepcopy(layer))
    together = first(exact(*args, **kwargs))
    for module in exact.modules():
        if isinstance(module, WRAPPERS):
            module.enable_adapters(False)
    alone = first(exact(*args, **kwargs))
    found = first(in_float64(plain)(*args, **kwargs))
    miss, effect, size = (x.detach().abs().max().item() for x in (found - together, together - alone, together))
    return miss, effect, size


def in_float64(layer: Any) -> Any:
    """The same layer, widened. Its experts compute one by one, as torch multiplies no groups in float64. Their config
    is the layer's own: `layer` is a copy."""
    for module in layer.modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            module.config = copy.deepcopy(module.config)
            module.config._experts_implementation = "eager"
    return layer.double()


def first(output: Any) -> torch.Tensor:
    """The hidden states of a layer that returns more than them."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def made_up(plain: Any) -> Call:
    """Inputs for a layer that the samples did not reach: an expert that no token was sent to."""
    weight = plain.weight
    if isinstance(plain, torch.nn.Embedding):
        return (torch.arange(len(weight), device=weight.device)[:64],), {}
    width = getattr(plain, "in_features", weight.shape[0])
    noise = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    return (noise.to(weight.device),), {}


def finite(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`. RunError where float16 has no such large numbers."""
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        raise RunError(f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot hold; use --dtype float32")
    return rounded


def digest(tensor: torch.Tensor) -> str:
    """Short stand-in for shape, dtype and every bit."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype}{list(tensor.shape)}{xxhash.xxh3_128_hexdigest(data)}"


def check_written(sums: Sums, model: PreTrainedModel) -> None:
    """RunError unless the model that was read back has exactly the tensors of `sums`. A bias that the architecture has
    a place for and the base has none (see `fill_bias_slots`) is zero."""
    state = model.state_dict()
    wrong = [name for name, tensor in state.items() if name in sums.digests and digest(tensor) != sums.digests[name]]
    added = [name for name in state.keys() - sums.digests.keys() if not name.endswith(".bias") or state[name].any()]
    wrong += sorted({*added, *(sums.digests.keys() - state.keys())})
    if wrong:
        shown = ", ".join(wrong[:3]) + (" …" if len(wrong) > 3 else "")
        raise RunError(
            f"the merged model differs from base + adapter: {len(wrong)} of {len(sums.digests)} tensors are not, as "
            f"they were written, the sum rounded once ({shown}); nothing was written"
        )


@contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """The model computes in float32 from the weights it has: each module's are widened while it computes."""
    kept: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def widen(module: torch.nn.Module, args: Any) -> None:
        kept[module] = [(p, p.data) for p in module.parameters(recurse=False) if p.is_floating_point()]
        for parameter, data in kept[module]:
            parameter.data = data.float()

    def narrow(module: torch.nn.Module, args: Any, output: Any) -> None:
        for parameter, data in kept.pop(module, []):
            parameter.data = data

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_pre_hook(widen) for module in owners]
    handles += [module.register_forward_hook(narrow, always_call=True) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def logits_of(model: torch.nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    """Logits in float32, one [length, vocabulary] tensor per sample."""
    model.eval()
    device = next(model.parameters()).device
    return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in samples]


def largest_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """(max |a - b|, the same relative to max |a|)."""
    difference = max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))
    return difference, difference / max(x.abs().max().item() for x in a)
