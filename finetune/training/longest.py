"""Before the first step the longest rows go forward and backward once: memory runs out in the first seconds or never.

Nothing is left of it: no gradient, no figure, and the random numbers come as they would have come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from finetune.models import hardware
from finetune.planning.memory import optimizer_bytes
from finetune.planning.network import trained_shapes
from finetune.terminal.progress import note
from finetune.training.held_out_figures import undisturbed


class LongestFirst(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, rows = self.trainer, longest(self.trainer)
        if len(rows) < 1:
            return
        if args.deepspeed or args.fsdp:  # a pass without a step has not been tried with them
            kind = "deepspeed" if args.deepspeed else "fsdp"
            note(f"the longest rows do not go through first under {kind}: memory may still run out when they come")
            return
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        counted, kept = trainer._total_train_tokens, {key: list(v) for key, v in trainer._metrics["train"].items()}
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        with undisturbed(trainer.model), forgotten(trainer.model):
            (first,), count = trainer.get_batch_samples(iter([batch]), 1, args.device)
            trainer.training_step(trainer.model_wrapped, first, count)
        trainer._total_train_tokens = counted
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(kept)
        width = batch["input_ids"].shape[-1]
        if len(batch["input_ids"]) < len(rows):  # all in one, without padding
            width = max(len(trainer.train_dataset[i]["input_ids"]) for i in rows)
        tell(len(rows), width, trainer.model, trainer.recipe.train.optim)


def longest(trainer: Any) -> list[int]:
    """Numbers of the longest rows, as many as make a pass."""
    dataset = trainer.train_dataset
    if not hasattr(dataset, "column_names"):  # blocks of text, all of one length
        return list(range(min(len(dataset), trainer.args.train_batch_size)))
    columns = zip(*(dataset[name] for name in trainer.length_columns), strict=True)
    lengths = [sum(len(ids) for ids in row) for row in columns]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return order[: trainer.args.train_batch_size]


@contextmanager
def forgotten(*models: Any) -> Iterator[None]:
    """Without the gradients afterwards."""
    try:
        yield
    finally:
        for model in models:
            for parameter in model.parameters():
                parameter.grad = None


def tell(rows: int, length: int, model: Any, optim: str) -> None:
    """How close it came: the peak, with the state that the optimizer will have."""
    machine = hardware.detect()
    state = optimizer_bytes(*trained_shapes(model), optim) / hardware.GB
    peak = hardware.peak_memory_gb() + state
    share = f"{peak:,.2g} of {machine.memory_gb:,.3g} GB"
    note(f"the longest rows went through first ({rows} x {length:,} tokens): {share} with the optimizer's state")
