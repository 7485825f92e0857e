"""Held-out rows while a trainer trains: figures that no batch size changes, answers, and which weights are the best."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from finetune import ranks
from finetune.errors import RunError
from finetune.metrics import Metric, ratio_interval
from finetune.run.writing import append_lines
from finetune.training import sharded
from finetune.training.several import in_turn

RESAMPLED = 10  # batches of held-out rows from which on they are resampled for an interval


class HeldOutFigures:
    """Mixed in before a transformers Trainer."""

    recipe: Any
    model: Any
    args: Any
    accelerator: Any
    control: Any
    state: Any
    eval_dataset: Any
    callback_handler: Any
    log: Callable[..., None]
    _save_checkpoint: Callable[..., None]
    predicting: bool
    batches: list[Any]
    """What was seen of each batch of held-out rows."""
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    during: During | None = None
    samples: Path | None = None
    """Where the answers of `during` are kept, to be looked at."""
    doing: Callable[[str], None] = staticmethod(lambda what: None)
    """Is told what a long step is at."""
    all_due = False

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
            if sharded.in_parts():  # all of them have to gather the weights
                with sharded.gathered(self.model):
                    figures = ranks.each(during.figures(self.model, self.doing))[0]
            else:
                figures = ranks.of_all(lambda: during.figures(self.model, self.doing))
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
