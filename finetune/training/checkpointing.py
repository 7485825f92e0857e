"""Checkpoints that are complete or not there, and hold all that a run needs to go on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from finetune import ranks
from finetune.adapters.resume import load_state, save_state
from finetune.models.hardware import rounding
from finetune.recipe.sections import TrainConfig
from finetune.run.checkpoints import complete, damage, discard, known_of, rotate
from finetune.terminal.progress import warn
from finetune.training import sharded
from finetune.training.callbacks import Proven
from finetune.training.health import Health
from finetune.training.weight_check import check_finite, trained


class Checkpointing:
    """Mixed in before a transformers Trainer."""

    recipe_train: TrainConfig
    model: Any
    args: Any
    control: Any
    state: Any
    callback_handler: Any
    file_names: dict[str, str]
    """Of what is trained, in checkpoints of weights in parts."""
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _tr_loss: torch.Tensor

    inputs: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)
    """{key: digest of its content} of what the run reads."""
    begun = 0.0
    """When training began, less what it had taken before it was stopped."""
    health: Health
    """Looks at every step."""
    failed: str | None = None
    """What is wrong with the weights that the model ends with."""
    in_batch: Callable[[int], str] | None = None
    """Says which rows a step was made of."""
    _loss_before = 0.0
    """What of _tr_loss is of the steps before."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Complete or not there; older ones go when it is there. RunError when there is nothing good to keep."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        check_finite(trained(self.model), f"at step {self.state.global_step}")
        apart: set[Path] = set()
        if self.args.should_save and folder.exists():
            apart = discard(folder)  # what a kill or a damaged checkpoint has left
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        counters = self._counters()
        if self.args.should_save:
            save_state(self.model, folder)
            best = self.state.best_model_checkpoint
            complete(folder, apart, inputs=self.inputs, counters=counters, rounding=rounding())
            if not self.health.high:  # or the last good one may be among those that go
                rotate(folder.parent, self.recipe_train.save_total_limit, best and Path(best).name)

    def _counters(self) -> dict[str, Any]:
        """What transformers and trl count in memory only."""
        best = self.state.best_model_checkpoint
        return {
            "loss": self._total_loss_scalar, "loss_since": ranks.mean(float(self._tr_loss)),
            "logged_at": self._globalstep_last_logged, "tokens": ranks.total(self._total_train_tokens),
            "metrics": ranks.lists(self._metrics["train"]),
            "patience": [stopper.early_stopping_patience_counter for stopper in self._stoppers()],
            "best": best and Path(best).name, "first_loss": self.health.first,
            "high": self.health.high, "zero": self.health.zero, "seconds": time.perf_counter() - self.begun,
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
        self.health.high, self.health.zero = known.get("high", 0), known.get("zero", 0)
        self._globalstep_last_logged = known["logged_at"]
        self._total_train_tokens = known["tokens"] if ranks.share() == 0 else 0
        if ranks.share() == 0:  # it has those of all
            self._metrics["train"].update({key: list(values) for key, values in known["metrics"].items()})
        self.begun -= known["seconds"]
        for stopper, counter in zip(self._stoppers(), known["patience"], strict=False):
            stopper.early_stopping_patience_counter = counter
        best = known["best"] and Path(self.args.output_dir) / known["best"]  # the run may lie elsewhere now
        self.state.best_model_checkpoint = str(best) if best else None
        if best and ranks.first() and (reason := damage(best)) is not None:
            what = f"the best checkpoint so far, {best}, is damaged ({reason})"
            warn(f"{what}: without a better one from here on the run will have failed, with its last weights kept")

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
        if sharded.in_parts():
            sharded.load(self.model, Path(resume_from_checkpoint), self.file_names)
        elif not load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        next(one for one in self.callback_handler.callbacks if isinstance(one, Proven)).finish()
        best = Path(self.state.best_model_checkpoint)
        if (reason := damage(best)) is not None:
            self.failed = f"the best checkpoint {best} is damaged ({reason}), and these are the last weights"
            return
        if sharded.in_parts():
            sharded.load(self.model, best, self.file_names)
        elif not load_state(self.model, best):
            super()._load_best_model()  # type: ignore[misc]


class CountOn(TrainerCallback):
    """Begins the count of a run, or takes it up where its checkpoint stood."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begun = time.perf_counter()
        if self.checkpoint is not None:
            self.trainer.count_on(self.checkpoint)
