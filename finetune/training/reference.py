"""Log-probabilities of the reference: of the policy as it stands before its first step.

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

from finetune.adapters.load import weights_dtype
from finetune.adapters.methods import METHODS, active
from finetune.base import Base
from finetune.cache import cache_folder
from finetune.models import sources
from finetune.models.adapter_files import weights
from finetune.models.quantization import is_quantized
from finetune.recipe.stages import DpoRecipe, KtoRecipe
from finetune.run.writing import write_json
from finetune.terminal.progress import task


class NoReference(nn.Module):
    """In the place of a reference model. trl makes none of its own where it is given one (a second adapter "ref", or
    the base loaded once more), and with the columns of `add` it asks none."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


# Of what is kept: 1 had other references where an adapter was continued, 2 rounded adapters on quantized bases and one
# name for every precision of `full`.
VERSION = "3"


def key_of(recipe: DpoRecipe | KtoRecipe, base: Base) -> str:
    """What identifies the reference: base, quantization, precision, and the adapter it starts from."""
    model = base.model
    parts = [VERSION, base.fingerprint, str(model.quantization), model.quantization_type]
    parts += [recipe.model.dtype, str(weights_dtype(recipe))]  # what computes, and what holds the weights
    parts += [str(model.rope_scaling), str(model.attn_implementation)]
    method = METHODS[recipe.adapter.method]
    if model.adapter is not None:
        folder = sources.adapter_folder(model.adapter)
        files = [folder / "adapter_config.json", weights(folder)]
        parts.append(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    elif not method.starts_as_base(recipe.adapter) and not method.virtual_tokens:
        parts.append(f"{recipe.adapter!r} {recipe.train.seed}")
    return " ".join(parts)


def add(trainer: Any, recipe: DpoRecipe | KtoRecipe, base: Base) -> None:
    """The columns that trl reads, computed once per content and kept on disk. base: what the adapter sits on."""
    key, folder, args = key_of(recipe, base), cache_folder() / "reference", trainer.args
    bare = base.model.adapter is None and active(trainer.model).virtual_tokens is not None
    with trainer.model.disable_adapter() if bare else nullcontext():
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
