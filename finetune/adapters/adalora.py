"""AdaLoRA while training: the plan of ranks, the penalty, a step of the allocator.

peft adds the penalty only to a loss that the model itself computes, and trainers compute their own.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune.adapters.methods import active
from finetune.recipe.adapters import AdaLoraAdapter


def tuner(model: Any) -> Any | None:
    """The AdaLoRA tuner of a model, or None."""
    return model.base_model if active(model).cuts_ranks else None


def plan(model: Any, section: AdaLoraAdapter, total_steps: int) -> None:
    config = model.peft_config["default"]
    tinit, tfinal = (round(v * total_steps) if v < 1 else int(v) for v in (section.tinit, section.tfinal))
    tfinal = min(tfinal, max(0, total_steps - 2))
    config.total_step, config.tfinal = total_steps, tfinal
    config.tinit = min(tinit, max(0, total_steps - tfinal - 1))


def penalty(model: Any) -> torch.Tensor | float:
    """R(P, Q) = |P^T P - I| + |Q Q^T - I| (Zhang et al. 2023, equation 4), weighted; 0.0 for other methods."""
    found = tuner(model)
    if found is None:
        return 0.0
    weight = found.peft_config["default"].orth_reg_weight
    terms = []
    for name, p in model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device)))
    return weight * torch.stack(terms).mean()


def allocate(model: Any, step: int) -> None:
    if (found := tuner(model)) is not None:
        found.update_and_allocate(step)


def importance(model: Any) -> dict[str, torch.Tensor]:
    """What the allocator has seen so far and the ranks it has cut, for checkpoints."""
    found = tuner(model)
    if found is None:
        return {}
    allocator, pattern = found.rankallocator, found.peft_config["default"].rank_pattern or {}
    state = {
        f"{kind}|{name}": value.cpu()
        for kind in ("ipt", "exp_avg_ipt", "exp_avg_unc")
        for name, value in getattr(allocator, kind).items()
    }
    return state | {f"pattern|{name}": torch.tensor(kept) for name, kept in pattern.items()}


def restore_importance(model: Any, state: dict[str, torch.Tensor]) -> None:
    found = tuner(model)
    if found is None:
        return
    pattern: dict[str, list[bool]] = {}
    for key, value in state.items():
        kind, _, name = key.partition("|")
        if kind == "pattern":
            pattern[name] = value.tolist()
        else:
            getattr(found.rankallocator, kind)[name] = value.to(model.device)
    found.peft_config["default"].rank_pattern = pattern or None
