"""The proof that a run trained what it was to train, and nothing else.

    gradients    every trainable tensor has a gradient at the first step, and a non-zero one within STEPS steps of
                 non-zero learning rate (LoRA's A waits for B to leave zero; experts may wait for a token)
    weights      frozen tensors are bit for bit what they were; every trained one has changed

Sums over the weights' bits stand for the weights: one pass over them at either end of the run, no copy.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from finetune.errors import RunError
from finetune.training.health import ADVICE

STEPS = 3
SHOWN = 5
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bit_sum(tensor: torch.Tensor) -> int | None:
    """A sum over the bits of a tensor; None where there are none (meta, offloaded)."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.device.type == "meta":
        return None
    return int(local.detach().view(BITS[local.element_size()]).sum(dtype=torch.int64))


def summary(names: Iterable[str]) -> dict[str, int]:
    """{name with * for numbers: how many}, adapter names left out."""
    short = (re.sub(r"\.\d+\.", ".*.", name).replace(".default", "") for name in names)
    return dict(Counter(short))


def is_expert(name: str) -> bool:
    return "expert" in name


class Proof:
    """Follows one run of one model."""

    def __init__(self, model: torch.nn.Module, within: int = STEPS) -> None:
        self.within = within
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        if not self.trainable:
            raise RunError("nothing would be trained: no parameter requires a gradient")
        self.before = {n: bit_sum(p) for n, p in (self.trainable | self.frozen).items()}
        self.waiting = set(self.trainable)
        """Tensors without a non-zero gradient so far."""
        self.late: set[str] = set()
        """Those among them that had a gradient of exactly zero at the first step."""
        self.seen = self.steps = 0

    @property
    def watching(self) -> bool:
        return self.steps < self.within

    def look(self) -> None:
        """At the gradients, just before a step of the optimizer."""
        if not self.watching:
            return
        missing = [n for n in self.waiting if self.trainable[n].grad is None and not is_expert(n)]
        if missing:
            raise RunError(f"no gradient reaches {names(missing)}: they would stay as they are")
        self.waiting = {n for n in self.waiting if (g := self.trainable[n].grad) is None or not bool(g.any())}
        if not self.seen:
            self.late = set(self.waiting)
        self.seen += 1

    def count(self, learning_rate: float) -> None:
        """A step was taken."""
        if not self.watching or not learning_rate:
            return
        self.steps += 1
        stuck = [n for n in self.waiting if not is_expert(n)]
        if self.steps == self.within and stuck:
            raise RunError(
                f"after {self.within} steps the gradient of {names(stuck)} is still exactly zero: they do not learn"
            )

    def finish(self) -> dict[str, Any]:
        """What result.json says. RunError if the changed tensors are not the declared ones."""
        after = {n: bit_sum(p) for n, p in (self.trainable | self.frozen).items()}
        changed = {n for n, bits in after.items() if bits != self.before[n]}
        leaked = [n for n in self.frozen if n in changed]
        if leaked:
            raise RunError(f"frozen weights have changed: {names(leaked)}")
        # AdaLoRA may cut a layer to rank zero, which is where it started.
        cut = {n for n in self.trainable if ".lora_E." in n and n not in changed and not bool(self.trainable[n].any())}
        changed |= cut
        stuck = [n for n in self.trainable if n not in changed and n not in self.waiting and not is_expert(n)]
        if stuck and self.steps >= self.within:
            raise RunError(f"trained weights are what they were: {names(stuck)}; is the learning rate too small?")
        return {
            "tensors": summary(self.trainable),
            "changed_equals_declared": changed == set(self.trainable),
            "frozen_tensors_unchanged": len(self.frozen),
            "zero_gradient_at_first": summary(self.late),
            "unrouted_experts": summary(self.waiting),
            "cut_to_rank_zero": summary(cut),
        }


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], when: str) -> None:
    """RunError that names the weights in which a number is none any more."""
    local = ((name, t.to_local() if hasattr(t, "to_local") else t) for name, t in weights)  # its own part of them
    broken = [name for name, tensor in local if not bool(tensor.isfinite().all())]
    if broken:
        raise RunError(f"weights are not finite {when}: {names(broken)}: {ADVICE}")


def trained(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def names(found: list[str]) -> str:
    return ", ".join(sorted(found)[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
