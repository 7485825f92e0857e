"""What is wrong with a step, and which rows it was made of: a loss that explodes, a gradient that is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import ranks
from finetune.data import packing
from finetune.data.rows import Rows
from finetune.errors import RunError
from finetune.run.directory import Run
from finetune.run.writing import write_lines
from finetune.terminal.progress import shown_path

ZERO_STEPS = 3  # steps in a row without any gradient at which a run stops
HIGH_STEPS = 5  # steps in a row with a loss over the limit
ADVICE = "lower train.learning_rate, look at the data with `ft data check`, or set model.dtype: float32"
NAMED = 3
Row = tuple[str, int]
"""Its file and its number there."""


class Health:
    """Looks at every step of a trainer. A step that float16's loss scaling leaves out has no norm, and is none of
    these."""

    def __init__(self, stage: str, vocabulary: int) -> None:
        self.of_text, self.vocabulary = stage in ("sft", "pretrain"), vocabulary
        self.first: float | None = None
        """The loss of the run's first step."""
        self.high = self.zero = 0

    def limit(self) -> float:
        """The loss from which on a model is worse than one that knows nothing, or than ten of what it was."""
        first = self.first or 0.0
        return max(3 * first, math.log(self.vocabulary) + 1) if self.of_text else 10 * max(first, 1.0)

    def look(self, step: int, loss: float, norm: float | None) -> None:
        """RunError for a loss that stays too high, and for a gradient that stays exactly zero."""
        if self.first is None:
            self.first = loss
        self.high = self.high + 1 if loss > self.limit() else 0
        self.zero = self.zero + 1 if norm == 0.0 and loss else 0
        if self.high >= HIGH_STEPS:
            what = f"the loss has exploded: {loss:.4g} at step {step}, and {self.first:.4g} at first"
            raise RunError(f"{what} (over {self.limit():.4g} for {HIGH_STEPS} steps): {ADVICE}")
        if self.zero >= ZERO_STEPS:
            what = f"the gradient has been exactly zero for {ZERO_STEPS} steps up to step {step}: nothing is learned"
            raise RunError(f"{what}; lower train.learning_rate, or set model.dtype: float32 and no model.quantization")


def rows_of_step(trainer: Any, step: int) -> list[int]:
    """Numbers of the rows in train_dataset that the `step`-th step is made of, from 1."""
    micro, accumulation = trainer.args.train_batch_size * ranks.shares(), trainer.args.gradient_accumulation_steps
    passes = math.ceil(len(trainer.train_dataset) / micro)
    epoch, place = divmod(step - 1, max(1, math.ceil(passes / accumulation)))
    order = trainer._get_train_sampler()
    if hasattr(order, "set_epoch"):  # blocks of text keep theirs
        order.set_epoch(epoch)
    rows = micro * accumulation
    return list(order)[place * rows : (place + 1) * rows]


def samples_of(trainer: Any, numbers: Sequence[int], max_length: int, rows: Any) -> list[int]:
    """Numbers of the samples in these rows: of a packed row all that are in it."""
    if "seq_lengths" not in getattr(trainer.train_dataset, "column_names", ()):
        return list(numbers)
    packs = packing.plan([len(ids) for ids in rows["input_ids"]], max_length)
    return [sample for number in numbers for sample in packs[number]]


def kept_batch(run: Run, rows: Sequence[dict[str, Any]], places: Sequence[Row]) -> str:
    """What a message says of the rows of a step, which are written to failed_batch.jsonl.

    Args:
        rows: by name what was read of each; places: theirs, or none.
    """
    path = run.path / "failed_batch.jsonl"
    where: list[dict[str, Any]] = [{"file": file, "row": row} for file, row in places] or [{} for _ in rows]
    write_lines(path, [{**place, **row} for place, row in zip(where, rows, strict=True)])
    return f"{named(places) or f'{len(rows)} rows'}, in {shown_path(path)}"


def named(places: Sequence[Row]) -> str:
    """rows 3, 17, 40 and 5 more of data.jsonl"""
    if not places:
        return ""
    file = places[0][0]
    same = [str(row) for name, row in places if name == file][:NAMED]
    listed, of, more = ", ".join(same), Path(file).name, len(places) - len(same)
    text = f"row {listed} of {of}" if len(same) == 1 else f"rows {listed} of {of}"
    return f"{text} and {more} more" if more else text


def in_batch(trainer: Any, run: Run, data: Rows, max_length: int, decode: Callable[[Any], str]) -> Callable[[int], str]:
    """Says which rows a step of a transformers trainer was made of, and keeps them."""
    rows, places = data.train, data.places

    def told(step: int) -> str:
        numbers = samples_of(trainer, rows_of_step(trainer, step), max_length, rows)
        texts = [
            {name.removesuffix("_ids"): decode(ids) for name, ids in rows[n].items() if name.endswith("_ids")}
            for n in numbers
        ]
        return kept_batch(run, texts, [places[n] for n in numbers] if len(places) else [])

    return told


def with_batch(error: str, told: str, run: Run) -> str:
    """What an error says, with the rows of its step and the checkpoint that is kept."""
    if (last := run.last_checkpoint()) is None:
        return f"{error}; the step had {told}"
    return f"{error}; the step had {told}; the last checkpoint before is kept: {shown_path(last)}"
