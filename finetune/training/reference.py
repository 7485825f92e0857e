"""Log-probabilities of the reference: of the policy as it stands before its first step.

They are computed before a checkpoint is loaded, so a run that goes on has those that it began with. The one start that
is no reference is a fresh soft prompt, which changes every answer: there it is the base without it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from finetune import ranks
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
from finetune.training.plan import Layout


class NoReference(nn.Module):
    """In the place of a reference model. trl makes none of its own where it is given one (a second adapter "ref", or
    the base loaded once more), and with the columns of `add` it asks none."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


# Of what is kept: 1 had other references where an adapter was continued, 2 rounded adapters on quantized bases and one
# name for every precision of `full`, 3 had all rows.
VERSION = "4"


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


def add(trainer: Any, recipe: DpoRecipe | KtoRecipe, base: Base, layout: Layout) -> None:
    """The columns that trl reads, computed once per content and kept on disk, of the rows that `layout` will train.

    base: what the adapter sits on.
    """
    key, folder, args = key_of(recipe, base), cache_folder() / "reference", trainer.args
    bare = base.model.adapter is None and active(trainer.model).virtual_tokens is not None
    with trainer.model.disable_adapter() if bare else nullcontext():
        order = trained_rows(trainer, layout)
        trainer.train_dataset = _with_columns(
            trainer, trainer.train_dataset, args.per_device_train_batch_size, order, f"{key} train", folder
        )
        if (held_out := trainer.eval_dataset) is not None:
            trainer.eval_dataset = _with_columns(
                trainer, held_out, args.per_device_eval_batch_size, range(len(held_out)), f"{key} eval", folder,
                training=False,
            )  # fmt: skip


def trained_rows(trainer: Any, layout: Layout) -> list[int]:
    """Numbers of the rows that will be trained, in the order of the first epoch; all of them after that."""
    order = list(trainer._get_train_sampler())
    return order[: layout.total_steps * layout.accumulation * layout.rows_per_pass * ranks.shares()]


def _with_columns(
    trainer: Any, rows: Any, size: int, order: Sequence[int], key: str, folder: Path, training: bool = True
) -> Any:
    """The rows with the columns, which are no numbers where a row is not in `order`; `size` of them make a pass."""
    digest = hashlib.sha256(key.encode())
    for row in rows:
        digest.update(repr(sorted(row.items())).encode())
    file = folder / f"{digest.hexdigest()}.json"
    columns: dict[str, list[float | None]] = {name: [None] * len(rows) for name in trainer.reference_columns}
    kept = ranks.from_first(lambda: file.read_text(encoding="utf-8") if file.is_file() else None)
    if kept is not None:
        columns = json.loads(kept)
    missing = [i for i in order if any(values[i] is None for values in columns.values())]
    if missing:
        as_measured(trainer.model, training)
        own: dict[int, tuple[float, ...]] = {}
        what = "scoring with the reference" if training else "scoring held-out rows with the reference"
        with task(what, len(missing)) as advance:
            for start in range(ranks.share() * size, len(missing), size * ranks.shares()):
                numbers = missing[start : start + size]
                batch = trainer.data_collator([rows[i] for i in numbers])
                batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
                found = trainer.compute_ref_log_probs(trainer.model, batch)
                own |= dict(zip(numbers, zip(*(values.tolist() for values in found), strict=True), strict=True))
                advance(len(numbers) * ranks.shares())
        for theirs in ranks.each(own):
            for i, row in theirs.items():
                for name, value in zip(trainer.reference_columns, row, strict=True):
                    columns[name][i] = value
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, columns)
    for name, values in columns.items():
        rows = rows.add_column(name, [math.nan if value is None else value for value in values])
    return rows


def as_measured(model: Any, training: bool) -> None:
    """Dropout off, and quantized layers as in training or not: those of int8 compute otherwise in training, and what
    is compared must be computed alike."""
    model.eval()
    for module in model.modules():
        if is_quantized(module):
            module.train(training)
