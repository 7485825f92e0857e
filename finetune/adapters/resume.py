"""The exact state of an adapter in a checkpoint, where peft's own file says too little to go on from.

peft saves what a prompt network made, not the network, and of AdaLoRA only the ranks that are left. For these a
checkpoint holds one more file, and resuming reads that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finetune.adapters import adalora
from finetune.adapters.methods import active

STATE_FILE = "training_state.safetensors"


def save_state(model: Any, folder: Path) -> None:
    """Nothing for methods that peft saves completely."""
    if active(model).needs_state:
        tensors = {f"weight|{n}": p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        tensors |= {f"ranks|{name}": value for name, value in adalora.importance(model).items()}
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / STATE_FILE)


@torch.no_grad()
def load_state(model: Any, folder: Path) -> bool:
    """Whether there was such a file, and it was read."""
    path = folder / STATE_FILE
    if not active(model).needs_state or not path.is_file():
        return False
    parameters = dict(model.named_parameters())
    rest = {}
    for key, value in load_file(path).items():
        kind, _, name = key.partition("|")
        if kind == "weight":
            parameters[name].copy_(value)
        else:
            rest[name] = value
    adalora.restore_importance(model, rest)
    return True
