"""A model of which each process holds a part of every layer: transformers' own plan for the network, and peft's LoRA on
it. All processes compute every pass together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

from finetune import ranks
from finetune.errors import Problem, UserError
from finetune.families import family

COMPARED = (
    "apertus", "arcee", "cohere", "cohere2", "cohere_compass_text", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4_unified_text", "gpt_neox", "granite", "helium", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "llama", "ministral", "ministral3", "mistral", "nanochat", "nemotron", "olmo", "phi", "qwen2", "qwen3",
    "seed_oss", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
"""Types whose loss and gradients are those of one process (`tests/models/test_tensor_parallel.py`). Not all are for
which transformers has a plan: those of youtu, hrm_text and gemma3n_text are others."""
NORMED = "replicated_with_grad_allreduce"
"""Of norms over a part's own heads. transformers 5.23 sums their gradient over the processes after every pass, what the
passes before have summed with it (`ReplicatedWithGradAllReduce`): trained, they learn something else than in one
process."""


def options() -> dict[str, Any]:
    """Of from_pretrained: each process reads its part."""
    return {"distributed_config": DistributedConfig(tp_size=ranks.count())} if ranks.side_by_side() else {}


def check(network: Any, config: Mapping[str, Any], name: str, processes: int, full: bool = False) -> None:
    """UserError for a network without weights, of this config.json, that cannot be shared out so.

    full: whether all of it is trained.
    """
    problems = list(_problems(network, config, name, processes, full))
    if problems:
        raise UserError(problems)


def _problems(network: Any, config: Mapping[str, Any], name: str, processes: int, full: bool) -> Iterator[Problem]:
    text, plan, key = network.config.get_text_config(), network.tp_plan or {}, "model.name"
    kind, elsewhere = text.model_type, "use --launch fsdp or ddp"
    if layout := family(str(config["model_type"])).layout:
        what = f"checkpoints in the original layout of {layout} are read whole"
        yield Problem(what, path=name, key=key, fix=elsewhere)
        return
    if config.get("quantization_config"):
        what = "the checkpoint is quantized, and --launch tp cuts up weights that are not"
        yield Problem(what, path=name, key=key, fix=elsewhere)
    if not any("layers." in layer for layer in plan):
        what = f"transformers has no plan to share out the layers of {kind}"
        yield Problem(what, path=name, key=key, fix=elsewhere)
    elif kind not in COMPARED:
        what = f"{kind} has not been found to learn the same with --launch tp as in one process"
        yield Problem(what, path=name, key=key, fix=elsewhere)
    elif full and NORMED in plan.values():
        what = f"transformers sums the gradients of {kind}'s norms wrongly where a step has several passes"
        fix = "use adapter.method: lora, which does not train them, or --launch fsdp"
        yield Problem(what, path=name, key=key, fix=fix)
    for heads in ("num_attention_heads", "num_key_value_heads"):
        many = getattr(text, heads, None)
        if isinstance(many, int) and many % processes:
            what = f"{heads} of {many} cannot be shared out evenly over {processes} processes"
            fix = f"use a number of processes that divides {many}, or --launch fsdp"
            yield Problem(what, path=name, key=key, fix=fix)
    for drop, value in text.to_dict().items():
        if drop.endswith(("dropout", "pdrop", "dropout_prob")) and drop != "classifier_dropout" and value:
            what = f"{kind} has dropout ({drop}: {value}), and each process would draw for its own part"
            yield Problem(what, path=name, key=key, fix=elsewhere)


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
    config: Any = getattr(model, "config", None)
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
    parts: list[Any] = [module for module in model.modules() if getattr(module, "_tp_size", None) is not None]
    for module in parts:
        module._tp_size = module._device_mesh = None
        module.config.distributed_config = None
