"""Log-probabilities of the reference: of the policy as it stands before its first step.

    add(trainer, key, folder)     beside the rows of a new DPO or KTO trainer, as the columns that trl reads
    as_measured(model, training)  for a pass without a gradient: nothing is dropped at random

They are computed before a checkpoint is loaded, so a run that goes on has those that it began with. The one start that
is no reference is a fresh soft prompt, which changes every answer: there it is the base without it.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.models.quantization import is_quantized
from finetune.run import write_json
from finetune.terminal.progress import task


class NoReference(nn.Module):
    """In the place of a reference model. trl makes none of its own where it is given one (a second adapter "ref", or
    the base loaded once more), and with the columns of `add` it asks none."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def add(trainer: Any, key: str, folder: Path, bare: bool = False) -> None:
    """Computed once per content and kept in `folder`.

    Args:
        key: what identifies the reference.
        bare: it is the base with the adapter off.
    """
    with trainer.model.disable_adapter() if bare else nullcontext():
        args = trainer.args
        trainer.train_dataset = _with_columns(
            trainer, trainer.train_dataset, args.per_device_train_batch_size, True, f"{key} train", folder
        )
        if trainer.eval_dataset is not None:
            trainer.eval_dataset = _with_columns(
                trainer, trainer.eval_dataset, args.per_device_eval_batch_size, False, f"{key} eval", folder
            )


def _with_columns(trainer: Any, rows: Any, size: int, training: bool, key: str, folder: Path) -> Any:
    """The rows with the columns; `size` of them make a pass."""
    digest = hashlib.sha256(key.encode())
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    file = folder / f"{digest.hexdigest()}.json"
    if file.is_file():
        columns = json.loads(file.read_text(encoding="utf-8"))
    else:
        as_measured(trainer.model, training)
        what = "scoring with the reference" if training else "scoring held-out rows with the reference"
        with task(what, len(rows)) as advance:
            passes = []
            for start in range(0, len(rows), size):
                batch = trainer.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
                batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
                passes.append(trainer.compute_ref_log_probs(trainer.model, batch))
                advance(size)
        found = (torch.cat(values).tolist() for values in zip(*passes, strict=True))
        columns = dict(zip(trainer.reference_columns, found, strict=True))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, columns)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def as_measured(model: Any, training: bool) -> None:
    """Dropout off, and quantized layers as in training or not: those of int8 compute otherwise in training, and what
    is compared must be computed alike."""
    model.eval()
    for module in model.modules():
        if is_quantized(module):
            module.train(training)
