"""trl's trainers with what they lack: rows that are token ids already, an order that can be resumed, muon, LoRA+, …

`Extras` is mixed into each trainer: the order of samples depends on (seed, epoch) alone, so that a resumed run sees
exactly the batches of an uninterrupted one; the optimizers of `optim`; loss scaling on CPUs; and what `several`,
`checkpointing` and `held_out_figures` bring. `RowMeans` gives every row of a step the same weight, however the step is
cut into passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from finetune import ranks
from finetune.adapters import adalora
from finetune.models.quantization import parameter_counts
from finetune.training import sharded
from finetune.training.checkpointing import Checkpointing
from finetune.training.held_out_figures import HeldOutFigures
from finetune.training.loss_parts import balances, score_trained_positions
from finetune.training.optim import MuonWithAdamW, decayed, faster_b, muon_split
from finetune.training.sampler import OrderedSampler
from finetune.training.several import Several, own_figures
from finetune.training.weight_check import is_expert


class Extras(Several, Checkpointing, HeldOutFigures):
    """Mixed in before a transformers Trainer."""

    loraplus_lr_ratio: float | None = None
    length_columns: tuple[str, ...] = ("input_ids",)
    current_gradient_accumulation_steps: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        score_trained_positions()
        self.batches, settings = [], kwargs["args"]
        if hasattr(settings, "router_aux_loss_coef") and not ranks.of_all(lambda: balances(kwargs["model"])):
            settings.router_aux_loss_coef = 0.0
        if not kwargs["model"].supports_gradient_checkpointing:  # who asks for it was told (session.prepare)
            settings.activation_checkpointing = settings.gradient_checkpointing = False
        named = kwargs["model"].named_parameters()  # tokens need not reach every expert; all else has a gradient
        settings.ddp_find_unused_parameters = any(p.requires_grad and is_expert(name) for name, p in named)
        strategy = settings.eval_strategy
        if kwargs.get("eval_dataset") is None:
            settings.eval_strategy = IntervalStrategy.NO  # transformers asks for rows otherwise
        settings.save_only_model = ranks.side_by_side()  # transformers saves no optimizer's parts; `Several` does
        with unrounded(kwargs["model"]):
            super().__init__(*args, **kwargs)
        settings.eval_strategy, settings.save_only_model = strategy, False
        self._tp_size = 1  # trl divides by it what it has gathered from all; here each has its own (`own_figures`)
        self.file_names = sharded.file_names(self.model) if sharded.in_parts() else {}
        if sharded.in_parts():
            self.model.counted = parameter_counts(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        columns = zip(*(dataset[name] for name in self.length_columns), strict=True)
        lengths = [max(len(ids) for ids in row) for row in columns]
        grouped = self.recipe_train.group_by_length and "seq_lengths" not in dataset.column_names
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.shares()
        group = step if grouped else 1
        return OrderedSampler(lengths, self.args.seed, group)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self._metrics = {"train": {}, "eval": {}}  # of trl, whose trainers replace it
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate drops autocast and loss scaling for fp16 on CPUs without a word; with them the path that
            # T4 and V100 take runs here, too.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return decayed(model)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """transformers puts parts and whole tensors into groups of their own, which one process has not."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if ranks.side_by_side():
            reached, trained = decayed(model), [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            matrices, others = ([p for n, p in trained if (n in reached) is wanted] for wanted in (True, False))
            options["params"] = [
                {"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0},
            ]  # fmt: skip
        return kind, options

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.recipe_train.optim == "muon" and self.optimizer is None:
            self.optimizer = MuonWithAdamW(*muon_split(self.model if model is None else model), self.recipe_train)
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if fresh and self.loraplus_lr_ratio is not None:
            faster_b(optimizer, self.model, self.loraplus_lr_ratio)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, with AdaLoRA's penalty once per step; of a spare row nothing."""
        spare, tokens, seen = inputs.pop("spare", False), self._total_train_tokens, self._metrics["train"]
        before = {key: len(values) for key, values in seen.items()}
        with own_figures(self.accelerator):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if spare and self.model.training:
            self._total_train_tokens = tokens
            for key, values in seen.items():
                del values[before.get(key, 0) :]
        if not self.model.training or isinstance(loss, tuple):
            return loss
        loss = loss * 0 if spare else loss
        return loss + adalora.penalty(self.model) / self.current_gradient_accumulation_steps

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """A step with a loss or gradient that is no number is logged, at which `Recorder` stops the run."""
        norm = None if grad_norm is None or self.accelerator.optimizer_step_was_skipped else float(grad_norm)
        loss = ranks.mean(float(tr_loss) - self._loss_before)
        if not math.isfinite(loss + (norm or 0.0)):
            self.control.should_log = True
        else:
            self.health.look(self.state.global_step, loss, norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)  # type: ignore[misc]
        self._loss_before = float(self._tr_loss)


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """While a trainer of trl is made: what is trained on a quantized base keeps its float32.

    trl 1.16 casts it to bfloat16 (`if _is_quantized_model:` in every __init__, sft_trainer.py:908), which cannot be
    undone: a policy that goes on from an adapter would begin elsewhere. It passes over what requires no gradient.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    trained = [p for p in model.parameters() if p.requires_grad] if quantized else []
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


class RowMeans:
    """Mixed in before a trainer whose loss of a pass is a mean over its rows.

    transformers averages over the passes of a step, so that a row of a short last pass would weigh more than others.
    """

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], int]:
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return batches, int(ranks.total(sum(len(batch["input_ids"]) for batch in batches if "spare" not in batch)))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the pass's rows, as its share of the mean over the step's."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if num_items_in_batch is None:
            return loss
        share = len(inputs["input_ids"]) / num_items_in_batch * ranks.shares()  # DDP averages over the processes
        return (loss[0] * share, loss[1]) if return_outputs else loss * share
