"""What a computation allocates and multiplies, seen op by op."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """What happened between two marks."""

    name: str
    peak: int
    """Bytes above those at its start."""
    net: int
    """Bytes more at its end than at its start."""
    flops: int
    freed: dict[str, int]
    """Bytes that were freed, by the earlier segment in which they were allocated."""


class Tracker(TorchDispatchMode):
    """Bytes of live tensors and FLOPs, in segments. Works on real tensors and on fake ones."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        """known: tensors that were there before; their bytes do not count."""
        super().__init__()
        self.live = self.high = self.begun = self.flops = 0
        self.segments: list[Segment] = []
        self.name = self.next = ""
        self.freed: dict[str, int] = {}
        self.sizes: dict[int, int] = {}
        self.born: dict[int, str] = {}
        for tensor in known:
            self._see(tensor, 0)

    def mark(self, name: str) -> None:
        """The segment `name` begins, and the one before it ends."""
        if self.name:
            net = self.live - self.begun
            self.segments.append(Segment(self.name, self.high - self.begun, net, self.flops, self.freed))
        self.name, self.begun, self.high, self.flops, self.freed = name, self.live, self.live, 0, {}
        self.next = ""

    def mark_next(self, name: str) -> None:
        """It begins with the next operation: what returns until then lets go of what it held."""
        self.next = name

    def _see(self, tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes() if size is None else size
        self.live += self.sizes[key]
        self.high = max(self.high, self.live)
        self.born[key] = self.name
        weakref.finalize(storage, self._gone, key)

    def count_apart(self, tensor: torch.Tensor, name: str) -> None:
        """Where the tensor is freed, it counts as of a segment of that name."""
        self.born[tensor.untyped_storage()._cdata] = name

    def _gone(self, key: int) -> None:
        size, born = self.sizes.pop(key), self.born.pop(key)
        self.live -= size
        if born != self.name:
            self.freed[born] = self.freed.get(born, 0) + size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.next:
            self.mark(self.next)
        run = REPLACED.get(func, func)
        out = run(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        packet = func._overloadpacket
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += attention_flops(args[0], args[1])
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += 2 * attention_flops(args[1], args[2])
        elif packet is aten._grouped_mm:
            self.flops += grouped_flops(*args)
        elif (counted := flop_registry.get(IN_PLACE.get(packet, packet))) is not None:
            self.flops += counted(*args, **kwargs, out_val=out)
        return out


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Shape of a product of groups: rows in groups times a stack of matrices, or the gradient of the stack.

    torch's own takes bfloat16 only where it has no numbers, and any precision where it has.
    """
    if a.ndim == b.ndim == 2:
        return a.new_empty(len(offs), a.shape[0], b.shape[1], dtype=out_dtype)
    lead = a.shape[:-1] if a.ndim == 2 else (a.shape[0], a.shape[1])
    return a.new_empty(*lead, b.shape[-1], dtype=out_dtype)


def grouped_flops(a: torch.Tensor, b: torch.Tensor, *_: Any) -> int:
    """Every row meets one matrix of the stack."""
    rows = a.shape[0] if a.ndim == 2 else a.shape[0] * a.shape[1]
    return 2 * rows * a.shape[-1] * b.shape[-1]


def attention_flops(q: torch.Tensor, k: torch.Tensor) -> int:
    """Two products of [queries, keys], the whole square."""
    rows, heads, queries, size = q.shape
    return int(4 * rows * heads * queries * k.shape[2] * size)


IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
REPLACED = {aten._grouped_mm.default: grouped_mm}
