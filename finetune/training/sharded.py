"""Weights that lie in parts (FSDP2): brought together for checkpoints, for the result and for answers.

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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from finetune import ranks


def in_parts() -> bool:
    """Whether FSDP has the weights; deepspeed's are its own business."""
    return ranks.sharded() and ranks.kind() == "fsdp"


def arguments() -> dict[str, Any]:
    """transformers' TrainingArguments for weights in parts; none for whole ones."""
    if not ranks.sharded():
        return {}
    if ranks.kind() == "fsdp":
        return fsdp(ranks.offloads())
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


def fsdp(offload: bool = False) -> dict[str, Any]:
    """FSDP2 by accelerate: a unit for each block, weights shared out in all of them, gathered for the block at work."""
    found = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
             "reshard_after_forward": True, "cpu_ram_efficient_loading": False, "cpu_offload": offload}  # fmt: skip
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


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """All of a tensor into its part in each process."""
    parameter.copy_(like(parameter, value))


def like(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device_mesh.device_type, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


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
    """{name in a checkpoint's weights: name of the parameter}, of a model that is not shared out yet."""
    parameters = {p.data_ptr(): name for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "peft_config"):
        return {name: name for name in parameters.values()}
    stored = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: parameters[value.data_ptr()] for key, value in stored.items() if value.data_ptr() in parameters}


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
