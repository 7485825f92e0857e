"""A model of which each process holds a part of every layer: transformers' own plan for the network, and peft's LoRA on
it. All processes compute every pass together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

from finetune import ranks
from finetune.errors import Problem, UserError

STYLES = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
"""Ways to share a layer out that have been compared with one process; experts, fused projections and low-rank
attention have others."""
AROUND = {"colwise_gather_output", "embedding_rowwise"}
"""Those of the output head and of the embeddings."""


def options() -> dict[str, Any]:
    """Of from_pretrained: each process reads its part."""
    return {"distributed_config": DistributedConfig(tp_size=ranks.count())} if ranks.side_by_side() else {}


def check(network: Any, name: str, processes: int) -> None:
    """UserError for a network without weights that cannot be shared out so."""
    config, plan = network.config.get_text_config(), network.tp_plan or {}
    inner = {style for layer, style in plan.items() if ".layers." in layer}
    kind, fix = config.model_type, "use --launch fsdp"
    problems = []
    if not inner:
        problems.append(Problem(f"transformers has no plan to share out the layers of {kind}", path=name, fix=fix))
    elif others := (inner - STYLES) | (set(plan.values()) - STYLES - AROUND):
        what = f"{kind} is shared out in ways that have not been tried with --launch tp ({', '.join(sorted(others))})"
        problems.append(Problem(what, path=name, fix=fix))
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % processes:
            what = f"{heads} heads ({key}) cannot be shared out evenly over {processes} processes"
            problems.append(Problem(what, path=name, fix="use a number of processes that divides them"))
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop", "dropout_prob")) and isinstance(value, int | float) and value > 0:
            what = f"the network drops out ({key}: {value}), and each process would draw for its own part"
            problems.append(Problem(what, path=name, fix=fix))
    if problems:
        raise UserError([Problem(p.message, path=p.path, key="model.name", fix=p.fix) for p in problems])


def with_adapter(network: Any, make: Callable[[Any], Any], whole: Any) -> Any:
    """`make(network)`, where what is trained begins as in one process, which has all of it at once.

    whole: the network in one piece, in memory that nobody has touched.
    """
    before = torch.get_rng_state()
    model = make(network)
    mend(model)
    torch.set_rng_state(before)
    start = {name: p.detach() for name, p in make(whole).named_parameters() if p.requires_grad}
    parameters = dict(model.named_parameters())
    for name, value in start.items():
        put(parameters[name], value)
    return model


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """All of a tensor into its part in each process."""
    parameter.copy_(like(parameter, value))


def like(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device_mesh.device_type, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def mend(model: Any) -> None:
    """peft 0.21 makes A and B as wide as this process's part of the layer, and says so in `in_features` and
    `out_features`; transformers 5.23 reads there how wide the layer is in all (`_from_local_last_dim_shard`)."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            for a, b in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
                a.in_features, b.out_features = base.in_features, base.out_features


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """One process saves the model: transformers would wait for the others, whatever it is given to save."""
    config = getattr(model, "config", None)
    before = getattr(config, "distributed_config", None)
    if before is None:
        yield
        return
    config.distributed_config = None
    try:
        yield
    finally:
        config.distributed_config = before


def forget(model: Any) -> None:
    """The model computes no more, and one process saves it: peft would gather what lies in parts, with the others."""
    for module in model.modules():
        if getattr(module, "_tp_size", None) is not None:
            module._tp_size = module._device_mesh = None
            module.config.distributed_config = None
