"""Weights that lie in parts (FSDP2, tensor parallelism): brought together for checkpoints, for the result and for
answers.

A checkpoint has the files that one process would write, so any number of processes goes on with it. What accelerate
offers instead puts (N-1)/N of an adapter back to its start (huggingface/accelerate#4206).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from finetune import ranks
from finetune.base import Base
from finetune.errors import UserError
from finetune.models import tensor_parallel
from finetune.models.quantization import is_held_quantized
from finetune.models.tensor_parallel import like, put
from finetune.recipe.stages import REFERENCE_FREE, DpoRecipe, KtoRecipe, Recipe


def in_parts() -> bool:
    """Whether what is trained lies in parts that are torch's; deepspeed's are its own business."""
    return ranks.sharded() and ranks.kind() != "deepspeed"


def gathers() -> bool:
    """Whether FSDP has them, which puts each block together while it is at work."""
    return ranks.sharded() and ranks.kind() == "fsdp"


def read_once(recipe: Recipe, base: Base) -> bool:
    """Whether the first process of each machine alone reads the weights, and the others get their parts from it.

    Not where each needs all of them before they are shared out: for the log-probabilities of a reference. Nor, in
    accelerate 1.15, where they are in 4 bits (`fsdp2_prepare_model`), or a checkpoint holds more than parameters
    (`fsdp2_load_full_state_dict` takes no buffers).
    """
    if not gathers() or recipe.model.is_new or is_held_quantized(recipe.model, base.config):
        return False
    if isinstance(recipe, KtoRecipe) or (isinstance(recipe, DpoRecipe) and recipe.dpo.loss_type not in REFERENCE_FREE):
        return False
    kept = base.skeleton.state_dict(keep_vars=True).values()
    return all(isinstance(value, nn.Parameter) for value in kept)


def arguments(once: bool = False) -> dict[str, Any]:
    """transformers' TrainingArguments for weights in parts, which the first process alone has read; none for whole
    ones."""
    if not ranks.sharded() or ranks.side_by_side():  # transformers sees those in the model
        return {}
    if gathers():
        return fsdp(ranks.offloads(), once)
    return {"deepspeed": deepspeed(ranks.deepspeed_stage(), ranks.offloads())}


def deepspeed(stage: int, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for ZeRO; transformers fills in `auto` from its own arguments."""
    main_memory = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload:
        zero |= {"offload_optimizer": main_memory} | ({"offload_param": main_memory} if stage == 3 else {})
    return {
        "zero_optimization": zero, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "zero_allow_untested_optimizer": True,
    }  # fmt: skip


def fsdp(offload: bool = False, once: bool = False) -> dict[str, Any]:
    """FSDP2 by accelerate: a unit for each block, weights shared out in all of them, gathered for the block at work."""
    found = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
             "reshard_after_forward": True, "cpu_ram_efficient_loading": once, "cpu_offload": offload}  # fmt: skip
    return {"fsdp": True, "fsdp_config": found}


def plain(tensor: Any) -> torch.Tensor:
    """All of a tensor on the CPU; every process must ask for it."""
    whole: torch.Tensor = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.cpu()


def back_in_parts(model: nn.Module) -> None:
    """A forward pass without a backward one leaves some units whole, and what is written there would be forgotten."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, whole, by name; empty tensors in all processes but the first."""
    back_in_parts(model)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = plain(parameter)
            found[name] = value if ranks.first() else torch.empty(0)
    return found


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """As one process would have it."""
    return tree_map_only(torch.Tensor, plain, optimizer.state_dict())


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """The state that one process would have, in parts."""
    inner = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                values[key] = like(parameter, value.float())
    inner.load_state_dict(state)


def file_names(model: Any) -> dict[str, str]:
    """{name in a checkpoint's weights: name of the parameter}."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not hasattr(model, "peft_config"):
        return {name: name for name in names}
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    stored = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {key: names[int(number)] for key, number in stored.items()}


def read(checkpoint: Path, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """What is trained, by name of the parameter, of a checkpoint's weights."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found.update({names[key]: value for key, value in load_file(file).items() if key in names})
    missing = set(names.values()) - found.keys()
    if missing:
        raise RuntimeError(f"{checkpoint} lacks {len(missing)} of the trained weights, as {min(missing)}")
    return found


def load(model: nn.Module, checkpoint: Path, names: Mapping[str, str]) -> None:
    """A checkpoint's weights into a model, shared out or not."""
    back_in_parts(model)
    parameters = dict(model.named_parameters())
    for name, value in read(checkpoint, names).items():
        put(parameters[name], value)


@torch.no_grad()
def bring_together(model: nn.Module) -> None:
    """What is trained becomes whole in the first process, to be saved; the frozen base stays in parts. The model
    computes no more."""
    if ranks.kind() == "deepspeed":
        bring_together_of_zero(model)
        return
    back_in_parts(model)
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad and isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    value = plain(parameter)
                    whole[id(parameter)] = nn.Parameter(value if ranks.first() else value[:0])
                    whole[id(parameter)].kept_alive = parameter  # type: ignore[attr-defined] # or its id comes again
                module._parameters[name] = whole[id(parameter)]
    for module in model.modules():  # `fully_shard` has put a class before the module's own, which knows parts only
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]
    tensor_parallel.forget(model)


def bring_together_of_zero(model: nn.Module) -> None:
    """ZeRO-3's parameters are empty outside of a pass."""
    trained_ones = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not trained_ones:
        return
    import deepspeed as library

    with library.zero.GatheredParameters(trained_ones):
        values = {id(p): nn.Parameter(p.detach().cpu().clone()) for p in trained_ones}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if id(parameter) in values:
                module._parameters[name] = values[id(parameter)]


def check_zero(then: dict[str, str], now: dict[str, str]) -> None:
    """UserError for a checkpoint of DeepSpeed that goes on otherwise: each of its processes has saved a part."""
    keys = ("launch", "processes")
    if "deepspeed" in (then.get("launch"), now["launch"]) and any(then.get(key) != now[key] for key in keys):
        was, is_ = (" ".join(str(found.get(key)) for key in reversed(keys)) for found in (then, now))
        what = f"the checkpoint is of {was} processes, and these are {is_}: DeepSpeed's parts fit no others"
        raise UserError(what, key="--launch", fix="go on as it was begun, or use --launch fsdp from the start")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every block whole in every process, which can write answers by itself; `generate` fails on parts."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
