"""The network that would be trained, without numbers: from its config, with the method attached as training does it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trl.trainer import utils as trl

from finetune.adapters.load import apply, as_score_task, weights_dtype
from finetune.adapters.methods import METHODS, without_head
from finetune.errors import UserError
from finetune.models.quantization import experts_of, linear_layers, packed_bytes
from finetune.models.score_head import with_score_head
from finetune.planning.tracker import Tracker
from finetune.recipe.stages import Recipe

SCORED = ("log_probs", "entropy", "is_top1")


@dataclass
class Network:
    """Some of the blocks, which stand for all."""

    model: Any
    mode: FakeTensorMode
    kinds: list[int]
    """For each block of the whole, the number of the one here that is like it."""
    blocks: list[nn.Module]
    """Those that are here."""
    weights: int
    """Bytes of what is not trained, buffers included."""
    trained: int
    """Bytes of what is trained."""
    total: int
    """Parameters."""
    trainable: int
    active: int
    """Parameters that a token goes through: of a mixture the experts that it is sent to."""
    largest: int
    """Bytes of the largest trained tensor."""
    shapes: list[torch.Size]
    """Of the trained tensors, but for those of embeddings."""
    embedded: list[torch.Size]
    """Of embeddings."""
    masked: bool = True
    """Whether it takes a mask of [rows, 1, length, length]."""
    seen: dict[Any, Any] = field(default_factory=dict)
    """What was traced already."""


class Packed(nn.Linear):
    """Stands for a linear layer of bitsandbytes: its packed bytes, and the unpacked weight while it multiplies."""

    kind = "int4"

    def size(self) -> int:
        numel = self.in_features * self.out_features
        return packed_bytes(numel) if self.kind == "int4" else numel + 4 * self.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        return _Unpacked.apply(x, self.out_features, self.bias, self.kind).to(dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wide: int, bias: Any, kind: str) -> torch.Tensor:
        ctx.shape = wide, x.shape[-1]
        ctx.x = x if kind == "int8" else None  # bitsandbytes' int8 keeps its input, which no one reads
        with torch.autocast("cpu", enabled=False):
            return nn.functional.linear(x, x.new_empty(wide, x.shape[-1]), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return grad @ grad.new_empty(*ctx.shape), None, None, None


def build(recipe: Recipe, skeleton: Any) -> Network:
    """The network of a base without weights (torch's meta device), which stays as it is.

    UserError for what cannot be attached, and for a network whose blocks are not found.
    """
    network = copy.deepcopy(skeleton)
    attend(network, recipe.model.attn_implementation)
    quantization = recipe.model.quantization
    if quantization is not None:
        pack(network, quantization)
    model = attach(recipe, network)
    model.train()
    if recipe.train.gradient_checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if METHODS[recipe.adapter.method].make_config is not None:
            model.enable_input_require_grads()
    return measured(recipe, model)


def attend(network: Any, kernel: str | None) -> None:
    """With the attention that training takes. Flash attention, whose package needs the GPU, is gone through as sdpa,
    which holds as much: its scores are nowhere whole either. UserError where the network has no such attention."""
    if kernel is None:
        return
    kernel = "sdpa" if "flash" in kernel else kernel
    try:
        network.set_attn_implementation(kernel)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0], key="model.attn_implementation") from error


def attach(recipe: Recipe, network: Any) -> Any:
    section = recipe.adapter
    if section.method == "other":
        raise UserError("an adapter of this kind cannot be planned", key="model.adapter", fix="try a few rows")
    if getattr(section, "init_lora_weights", None) is not None:
        section = section.model_copy(update={"init_lora_weights": "default"})  # others look at the weights
    with torch.device("meta"):
        if recipe.stage == "reward":
            return apply(with_score_head(network, recipe.model.name), without_head(section), adjust=as_score_task,
                         draw=False)  # fmt: skip
        model = apply(network, section, draw=False)
    if recipe.stage != "ppo":
        trl.add_fused_lm_head(model.get_base_model() if hasattr(model, "get_base_model") else model, outputs=SCORED)
    return model


def pack(network: nn.Module, kind: str) -> None:
    """Linear layers become `Packed`, as those of bitsandbytes would stand in their place."""
    for module in linear_layers(network):
        module.__class__ = Packed
        module.kind = kind
        wide = module.weight.shape[0] if hasattr(module, "in_features") else module.weight.shape[1]
        module.in_features, module.out_features = module.weight.numel() // wide, wide  # Conv1D keeps them transposed


def blocks_of(model: nn.Module) -> tuple[nn.Module, str]:
    """(module that holds the list of blocks, the list's name). UserError where there is none."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outer:
        kind = getattr(model.config, "model_type", "?")
        raise UserError(f"{kind} keeps its layers in no list: its memory cannot be planned", key="model.name",
                        fix="try it on a few rows")  # fmt: skip
    name = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


def kind_of(block: nn.Module) -> Any:
    """What makes two blocks alike: class, shapes, what is trained, and how far attention reaches."""
    shapes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in block.named_parameters())
    reach = tuple(str(getattr(m, "sliding_window", None)) for m in block.modules() if hasattr(m, "sliding_window"))
    return type(block).__name__, shapes, getattr(block, "attention_type", None), reach


def measured(recipe: Recipe, model: Any) -> Network:
    """Count the whole, then leave only as many blocks as there are kinds, and fill them with fake tensors."""
    dtype = weights_dtype(recipe)
    weights = trained = total = trainable = 0
    shapes, embedded = trained_shapes(model)
    packed = {id(m.weight): m.size() for m in model.modules() if isinstance(m, Packed)}
    if recipe.model.quantization == "int4":
        packed |= {
            id(getattr(m, n)): packed_bytes(getattr(m, n).numel()) for m in model.modules() for n in experts_of(m)
        }
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
            trained += parameter.numel() * held_as(parameter, dtype).itemsize
        else:
            weights += packed.get(id(parameter), parameter.numel() * held_as(parameter, dtype).itemsize)
    weights += sum(b.numel() * b.element_size() for b in model.buffers())
    idle = idle_experts(model)
    parent, name = blocks_of(model)
    blocks = list(getattr(parent, name))
    found = [kind_of(block) for block in blocks]
    # The first block may compute fewer gradients than its like: it stands only for itself.
    wanted, kept = set(found[1:]), 1
    while not wanted <= set(found[1:kept]):
        kept += 1
    kinds = [0, *(max(j for j in range(1, kept) if found[j] == kind) for kind in found[1:])]
    setattr(parent, name, nn.ModuleList(blocks[:kept]))
    mode = FakeTensorMode()
    fill(model, mode, dtype)
    largest = max((s.numel() for s in (*shapes, *embedded)), default=0) * 4
    return Network(
        model, mode, kinds, blocks[:kept], weights, trained, total, trainable, total - idle, largest, shapes, embedded
    )


def trained_shapes(model: nn.Module) -> tuple[list[torch.Size], list[torch.Size]]:
    """Of what is trained: (all others, embeddings)."""
    of = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p.shape for p in trained if id(p) not in of], [p.shape for p in trained if id(p) in of]


def held_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The precision that a parameter is held in: what is trained in float32."""
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if tensor.requires_grad else dtype


def fill(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Tensors without numbers in the place of those without memory; tied ones stay tied."""
    made: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    hollow = isinstance(module, Packed) and name == "weight"
                    kind = held_as(parameter, dtype)
                    empty = torch.empty(1, dtype=kind).expand(parameter.shape) if hollow else torch.empty(
                        parameter.shape, dtype=kind)  # fmt: skip
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            held: Any = vars(module).get("prompt_tokens", {})  # ids of virtual tokens, a plain attribute
            for name, ids in held.items():
                held[name] = torch.zeros(ids.shape, dtype=ids.dtype)


def idle_experts(model: Any) -> int:
    """Parameters of experts that a token does not go through."""
    text = model.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    chosen = next((n for n in (getattr(text, name, None) for name in names) if isinstance(n, int)), None)
    if chosen is None:
        return 0
    idle = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] > chosen:
                idle += parameter.numel() * (parameter.shape[0] - chosen) // parameter.shape[0]
        if isinstance(module, nn.ModuleList) and type(module).__name__ != "ModuleList":
            continue
    return idle


def tracker_of(network: Network) -> Tracker:
    return Tracker([*network.model.parameters(), *network.model.buffers()])
