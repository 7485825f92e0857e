"""trl's trainers with what they lack: rows that are token ids already, an order that can be resumed, muon, LoRA+, …

`Extras` is mixed into each trainer: the order of samples depends on (seed, epoch) alone, so that a resumed run sees
exactly the batches of an uninterrupted one; the optimizers of `optim`; loss scaling on CPUs; checkpoints that are
complete or not there and hold all that a resumed run needs; held-out figures that no batch size changes. `RowMeans`
gives every row of a step the same weight, however the step is cut into passes.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune import ranks
from finetune.adapters import adalora
from finetune.adapters.resume import load_state, save_state
from finetune.errors import RunError, UserError
from finetune.metrics import Metric, ratio_interval
from finetune.models.hardware import rounding
from finetune.models.quantization import parameter_counts
from finetune.recipe.sections import TrainConfig
from finetune.run.checkpoints import complete, damage, discard, known_of, rotate
from finetune.run.writing import append_lines
from finetune.training import sharded
from finetune.training.callbacks import Proven
from finetune.training.health import Health
from finetune.training.loss_parts import balances, score_trained_positions, scores_are_its_own
from finetune.training.optim import MuonWithAdamW, decayed, faster_b, muon_split
from finetune.training.sampler import OrderedSampler, SharedBatches, Spared
from finetune.training.weight_check import check_finite, is_expert, trained

RESAMPLED = 10  # batches of held-out rows from which on they are resampled for an interval


class Extras:
    """Mixed in before a transformers Trainer."""

    recipe: Any
    recipe_train: TrainConfig
    loraplus_lr_ratio: float | None = None
    length_columns: tuple[str, ...] = ("input_ids",)
    optimizer: Any
    model: Any
    args: Any
    accelerator: Any
    control: Any
    state: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    callback_handler: Any
    current_gradient_accumulation_steps: int
    predicting = False
    """Whether a batch of held-out rows is at work."""
    batches: list[Any]
    """What was seen of each batch of held-out rows."""
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        score_trained_positions()
        self.batches, settings = [], kwargs["args"]
        if hasattr(settings, "router_aux_loss_coef") and not balances(kwargs["model"]):
            settings.router_aux_loss_coef = 0.0
        if not kwargs["model"].supports_gradient_checkpointing:  # who asks for it was told (session.prepare)
            settings.activation_checkpointing = settings.gradient_checkpointing = False
        named = kwargs["model"].named_parameters()  # tokens need not reach every expert; all else has a gradient
        settings.ddp_find_unused_parameters = any(p.requires_grad and is_expert(name) for name, p in named)
        strategy = settings.eval_strategy
        if kwargs.get("eval_dataset") is None:
            settings.eval_strategy = IntervalStrategy.NO  # transformers asks for rows otherwise
        with unrounded(kwargs["model"]):
            super().__init__(*args, **kwargs)
        settings.eval_strategy = strategy
        self.file_names = sharded.file_names(self.model) if in_parts() else {}
        if in_parts():
            self.model.counted = parameter_counts(self.model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        columns = zip(*(dataset[name] for name in self.length_columns), strict=True)
        lengths = [max(len(ids) for ids in row) for row in columns]
        grouped = self.recipe_train.group_by_length and "seq_lengths" not in dataset.column_names
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * ranks.count()
        group = step if grouped else 1
        return OrderedSampler(lengths, self.args.seed, group)

    # --- several processes ---

    def get_train_dataloader(self) -> Any:
        if ranks.count() == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        return shared_loader(self, self.train_dataset, self._get_train_sampler(), self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if ranks.count() == 1:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return shared_loader(self, rows, SequentialSampler(rows), self.args.eval_batch_size)

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> Any:
        """Trained tokens of a step in all processes, spare rows left out; held-out batches are means of their own."""
        if ranks.count() > 1 and self.predicting:
            return None
        names = ("labels", "shift_labels")
        counted = [
            {n: torch.full_like(v, -100) if n in names and "spare" in batch else v for n, v in batch.items()}
            for batch in batches
        ]
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """trl's means, over the passes of all processes."""
        own = self._metrics["train" if self.model.training else "eval"]
        if ranks.count() > 1 and self.model.training:
            every = ranks.each(dict(own))
            for key in dict.fromkeys(key for values in every for key in values):
                own[key] = [value for values in every for value in values.get(key, ())]
            if "num_tokens" in own:
                own["num_tokens"] = [ranks.total(self._total_train_tokens)]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        """The first process writes those of all: beside it nobody writes into a checkpoint."""
        if ranks.count() == 1:
            return super()._save_rng_state(output_dir)  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as scratch:
            super()._save_rng_state(scratch)  # type: ignore[misc]
            files = ranks.each({file.name: file.read_bytes() for file in Path(scratch).iterdir()})
        if ranks.first():
            for name, content in (item for each in files for item in each.items()):
                (Path(output_dir) / name).write_bytes(content)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not in_parts():
            return super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        weights = sharded.trained(self.model)
        if ranks.first():
            self._save(output_dir, state_dict=weights)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not in_parts():
            return super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state = sharded.optimizer_state(self.optimizer)
        if ranks.first():
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not in_parts() or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        kept = [torch.load(Path(checkpoint) / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")]
        sharded.load_optimizer(self.optimizer, kept[0])
        self.lr_scheduler.load_state_dict(kept[1])

    # --- set-up ---

    def create_accelerator_and_postprocess(self) -> None:
        if in_parts() and self.args.device.type == "cpu":
            # accelerate 1.15 shards where it knows a GPU's kind of group (`AcceleratorState`), and on CPUs goes on
            # without a word with whole weights in every process. torch shards there as well.
            self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if in_parts() and not self.accelerator.is_fsdp2:
            what = f"accelerate does not share out the weights on {self.args.device.type}"
            raise UserError(what, key="--launch", fix="use ddp")
        self._metrics = {"train": {}, "eval": {}}  # of trl, whose trainers replace it
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate drops autocast and loss scaling for fp16 on CPUs without a word; with them the path that
            # T4 and V100 take runs here, too.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return decayed(model)

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

    # --- checkpoints ---

    inputs: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)
    """{key: digest of its content} of what the run reads."""
    begun = 0.0
    """When training began, less what it had taken before it was stopped."""
    health: Health
    """Looks at every step."""
    in_batch: Callable[[int], str] | None = None
    """Says which rows a step was made of."""
    _loss_before = 0.0
    """What of _tr_loss is of the steps before."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Complete or not there; older ones go when it is there. RunError when there is nothing good to keep."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        check_finite(trained(self.model), f"at step {self.state.global_step}")
        if self.args.should_save and folder.exists():
            discard(folder)  # what a kill or a damaged checkpoint has left
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        counters = self._counters()
        if self.args.should_save:
            save_state(self.model, folder)
            best = self.state.best_model_checkpoint
            complete(folder, inputs=self.inputs, counters=counters, rounding=rounding())
            if not self.health.high:  # or the last good one may be among those that go
                rotate(folder.parent, self.recipe_train.save_total_limit, best and Path(best).name)

    def _counters(self) -> dict[str, Any]:
        """What transformers and trl count in memory only."""
        best = self.state.best_model_checkpoint
        return {
            "loss": self._total_loss_scalar, "loss_since": ranks.mean(float(self._tr_loss)),
            "logged_at": self._globalstep_last_logged, "tokens": ranks.total(self._total_train_tokens),
            "metrics": dict(self._metrics["train"]),
            "patience": [stopper.early_stopping_patience_counter for stopper in self._stoppers()],
            "best": best and Path(best).name, "first_loss": self.health.first,
            "seconds": time.perf_counter() - self.begun,
        }  # fmt: skip

    def count_on(self, checkpoint: Path) -> None:
        """From where the run stood at a checkpoint; called when transformers has set everything to zero."""
        self.state.compute_steps(self.args, self.state.max_steps)  # of the recipe as it is now, not as it was
        known = known_of(checkpoint).get("counters")
        if known is None:
            return
        self._total_loss_scalar, self._initial_global_step = known["loss"], 0
        self._tr_loss = torch.tensor(known["loss_since"], device=self.args.device)
        self._loss_before, self.health.first = known["loss_since"], known.get("first_loss")
        self._globalstep_last_logged = known["logged_at"]
        self._total_train_tokens = known["tokens"] if ranks.first() else 0
        self._metrics["train"].update({key: list(values) for key, values in known["metrics"].items()})
        self.begun -= known["seconds"]
        for stopper, counter in zip(self._stoppers(), known["patience"], strict=False):
            stopper.early_stopping_patience_counter = counter
        best = known["best"] and Path(self.args.output_dir) / known["best"]  # the run may lie elsewhere now
        self.state.best_model_checkpoint = str(best) if best and best.is_dir() else None

    def _stoppers(self) -> list[Any]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing when all steps are taken: transformers looks only after one more."""
        patient = all(c.early_stopping_patience_counter < c.early_stopping_patience for c in self._stoppers())
        if self.state.global_step < self.state.max_steps and patient:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if in_parts():
            sharded.load(self.model, Path(resume_from_checkpoint), self.file_names)
        elif not load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        next(one for one in self.callback_handler.callbacks if isinstance(one, Proven)).finish()
        best = Path(self.state.best_model_checkpoint)
        if (reason := damage(best)) is not None:
            self.failed = f"the best checkpoint {best} is damaged ({reason}), and these are the last weights"
            return
        if in_parts():
            sharded.load(self.model, best, self.file_names)
        elif not load_state(self.model, best):
            super()._load_best_model()  # type: ignore[misc]

    # --- every step ---

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

    # --- held-out rows ---

    during: During | None = None
    samples: Path | None = None
    """Where the answers of `during` are kept, to be looked at."""
    doing: Callable[[str], None] = staticmethod(lambda what: None)
    """Is told what a long step is at."""
    all_due = False
    failed: str | None = None
    """What is wrong with the weights that the model ends with."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The held-out loss, the answers' metrics, or both. What is trained afterwards is as it would be without."""
        try:
            with undisturbed(self.model):
                return self._evaluated(*args, **kwargs)
        except Exception:
            # What is due comes after the evaluation, and would be lost; one of several cannot save by itself.
            if self.control.should_save and ranks.count() == 1:
                self._save_checkpoint(self.model, None)
            raise

    def _evaluated(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.eval_dataset is not None:
            found: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
            return found
        self.model.eval()  # trl logs what it has of training otherwise
        figures = self.answered()
        self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def evaluate_all(self) -> dict[str, float]:
        """All of it, whatever the step."""
        self.all_due = True
        return self.evaluate()

    def measured(self) -> set[str]:
        """The keys of an evaluation in which nothing is left out."""
        loss = {"eval_loss"} if self.eval_dataset is not None else set()
        return loss | {f"eval_{metric.name}" for metric in (self.during.metrics if self.during else ())}

    def answers_due(self) -> bool:
        """At their own steps, and in the evaluation of the last one."""
        step, last = self.state.global_step, self.state.max_steps
        return self.during is not None and (self.all_due or step >= last or self.during.due(step))

    def answered(self) -> dict[str, Any]:
        """The metrics of answers to held-out rows, where they are due."""
        if not self.answers_due():
            return {}
        assert self.during is not None
        during = self.during
        with self.accelerator.autocast():
            if in_parts():  # all of them have to gather the weights
                with sharded.gathered(self.model):
                    figures = ranks.each(during.figures(self.model, self.doing))[0]
            else:
                figures = ranks.from_first(lambda: during.figures(self.model, self.doing))
        if self.samples is not None and self.is_world_process_zero():  # type: ignore[attr-defined]
            append_lines(self.samples, [{"step": self.state.global_step, **row} for row in during.samples])
        return {f"eval_{name}": value for name, value in figures.items()}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """RunError where the metric was not measured; where it is not due, nothing is better."""
        key, recipe = self.args.metric_for_best_model, self.recipe
        if key is not None and key not in metrics:
            if recipe.best_in_answers and not self.answers_due():
                return False
            known = (k for k, v in metrics.items() if k.startswith("eval_") and isinstance(v, float))
            found = ", ".join(k.removeprefix("eval_") for k in known) or "nothing else"
            raise RunError(f"train.metric_for_best_model: no {key.removeprefix('eval_')} was measured, but {found}")
        best: bool = super()._determine_best_metric(metrics, trial)  # type: ignore[misc]
        return best

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        spare, self.predicting = "spare" in inputs, True
        try:
            found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.predicting = False
        logged = self._metrics["eval"]
        values = {"loss": float(found[0]), **{key: float(values[-1]) for key, values in logged.items()}}
        logged.clear()
        if spare:
            return found
        self.batches.append({key: (value, self.weight(key, inputs)) for key, value in values.items()})
        return found

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """What a batch's figure is a mean over: its trained tokens."""
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        return float((labels != -100).sum())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every figure over all held-out rows at once, not the mean of what the batches have."""
        self.batches = []
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        self.batches = in_turn(ranks.each(self.batches))
        figures = self.figures()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = figures.pop("loss")
        parts = [batch["loss"] for batch in self.batches if "loss" in batch and batch["loss"][1]]
        if len(parts) >= RESAMPLED:
            totals, weights = [value * weight for value, weight in parts], [weight for _, weight in parts]
            output.metrics[f"{prefix}_loss_ci"] = list(ratio_interval(totals, weights))
        self._metrics["eval"].update({key: [value] for key, value in figures.items()})
        output.metrics.update({f"{prefix}_{key}": value for key, value in figures.items()} | self.answered())
        return output

    def figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for key in dict.fromkeys(key for batch in self.batches for key in batch):
            values = [batch[key] for batch in self.batches if key in batch and batch[key][1]]
            if key == "num_tokens":
                found[key] = ranks.total(self._total_train_tokens)
            elif key in ("min_reward", "max_reward"):
                found[key] = (min if key == "min_reward" else max)(value for value, _ in values)
            else:
                total = sum(weight for _, weight in values)
                found[key] = sum(value * weight for value, weight in values) / total if total else math.nan
        return found


def in_parts() -> bool:
    """Whether FSDP has the weights; deepspeed's are its own business."""
    return ranks.sharded() and ranks.kind() == "fsdp"


def in_turn(each: Sequence[list[Any]]) -> list[Any]:
    """Batches as one process would see them: the first of each, then the second, …"""
    longest = max(map(len, each))
    return [batches[number] for number in range(longest) for batches in each if number < len(batches)]


def shared_loader(trainer: Any, rows: Any, order: Sampler[int], size: int) -> Any:
    """This process's batches of `rows`, of which spare ones say so; accelerate deals them out."""

    def collated(picked: list[dict[str, Any]]) -> dict[str, Any]:
        spare = [row.pop("spare", False) for row in picked]
        batch: dict[str, Any] = trainer.data_collator(picked)
        return {**batch, "spare": True} if any(spare) else batch

    batches = SharedBatches(order, size, ranks.count())
    pin = trainer.args.dataloader_pin_memory and trainer.args.device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(Spared(rows), batch_sampler=batches, collate_fn=collated, pin_memory=pin)  # type: ignore[arg-type]
    return trainer.accelerator.prepare(loader)


@contextmanager
def own_figures(accelerator: Any) -> Iterator[None]:
    """trl gathers the figures of every pass from all processes, row by row, which must be as many in each. Here each
    keeps its own: `Extras.log` and `evaluation_loop` bring them together, once."""
    if ranks.count() == 1:
        yield
        return
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda value, *_, **__: value)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)


class During(Protocol):
    """What answers held-out rows while a run trains: `evaluation.during`."""

    metrics: Sequence[Metric]
    samples: list[dict[str, Any]]

    def due(self, step: int) -> bool: ...

    def figures(self, model: Any, doing: Callable[[str], None]) -> dict[str, Any]: ...


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Afterwards every module trains or not as before, and the same random numbers come as would have come."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training


class CountOn(TrainerCallback):
    """Begins the count of a run, or takes it up where its checkpoint stood."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begun = time.perf_counter()
        if self.checkpoint is not None:
            self.trainer.count_on(self.checkpoint)


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
        share = len(inputs["input_ids"]) / num_items_in_batch * ranks.count()  # DDP averages over the processes
        return (loss[0] * share, loss[1]) if return_outputs else loss * share


@dataclass
class Collator(DataCollatorForLanguageModeling):
    """trl's, with the loss weights of turns where the data has them.

    Packed rows: with `padding_free` all of a pass are one row, for kernels that take documents of any length. Without,
    each stays a row (`return_position_ids`): attention that masks documents apart costs the square of a row's length.
    """

    boundaries: bool = True
    """Whether one row says where its documents begin, as kernels are told, and not by its positions alone."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if "weights" in examples[0]:
            rows = [example["weights"] for example in examples]
            rows = [[w for row in rows for w in row]] if self.padding_free else rows
            longest = batch["labels"].shape[1]
            batch["weights"] = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])
        if self.return_position_ids:
            # Documents begin at position 0, and padding is documents of one token: transformers tells them apart by
            # that alone, and only where there is no other mask.
            batch["tokens"] = int(batch.pop("attention_mask").sum())
            batch["labels"][batch["position_ids"] == 0] = -100
        elif self.padding_free:
            batch["tokens"] = sum(len(example["input_ids"]) for example in examples)
            for key in (
                () if self.boundaries else ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
            ):
                del batch[key]
        return batch


class _WeightedSft(SFTTrainer):
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_scores = scores_are_its_own(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's loss; with weights the sum of weight x negative log-likelihood over the number of trained tokens.

        Label smoothing is done here with and without weights: trl's own takes no weights, and no virtual tokens. So is
        all loss of a model whose log-probabilities trl gets wrong, from its logits.
        """
        weights, smoothing = inputs.pop("weights", None), self.args.label_smoothing_factor
        tokens, seen = inputs.pop("tokens", None), self._total_train_tokens
        if weights is None and not smoothing and self.own_scores:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if tokens is not None and self.model.training:  # trl counts the positions of the first row
                self._total_train_tokens = seen + tokens
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return found
        labels = inputs["labels"][:, 1:]
        trained = labels != -100
        if smoothing or not self.own_scores:
            given = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**given, use_cache=False)
            logits = outputs.logits[:, -labels.shape[1] - 1 : -1].float()
            every = logits.log_softmax(-1)
            right = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            logps = ((1 - smoothing) * right + smoothing * every.mean(-1)) * trained
            likeliest = (logits.argmax(-1) == labels) & trained
        else:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            logps, likeliest = outputs.log_probs[:, -labels.shape[1] :], outputs.is_top1[:, -labels.shape[1] :]
        accuracy = likeliest.sum() / trained.sum().clamp(min=1)
        self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(accuracy.item())
        losses = -logps if weights is None else -logps * weights[:, 1:].to(logps)
        if self.model.training:
            self._total_train_tokens += int(inputs["labels"].numel()) if tokens is None else tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        loss = losses.sum() / (trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * ranks.count()  # DDP averages over the processes
        return (loss, outputs) if return_outputs else loss


class Sft(Extras, _WeightedSft):
    """Rows of input_ids, labels and, where there are any, weights and seq_lengths."""
