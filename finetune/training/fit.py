"""A transformers trainer from its first or its last checkpoint to its outcome."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from finetune import ranks
from finetune.adapters.methods import METHODS
from finetune.errors import Interrupted, RunError
from finetune.recipe.stages import Recipe
from finetune.run.checkpoints import known_of
from finetune.run.directory import Run
from finetune.run.resuming import to_go_on
from finetune.terminal.progress import Progress
from finetune.training.callbacks import Guard, Patience, Proven, Ranks, Recorder
from finetune.training.checkpointing import CountOn
from finetune.training.health import Health, with_batch
from finetune.training.longest import LongestFirst
from finetune.training.weight_check import check_finite, trained


def callbacks(recipe: Recipe, run: Run, has_eval: bool) -> list[TrainerCallback]:
    """What happens beside training, for any trainer."""
    may_stop = bool(recipe.train.early_stopping_patience and has_eval)
    found: list[TrainerCallback] = [Recorder(run, Progress(recipe.stage), may_stop), Guard(), Proven()]
    if METHODS[recipe.adapter.method].cuts_ranks:
        found.append(Ranks(recipe.adapter))
    if may_stop:
        found.append(Patience(early_stopping_patience=recipe.train.early_stopping_patience))
    return found


def vocabulary(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "vocab_size", None) or 1 << 17)


def finish_setup(trainer: Any, recipe: Recipe) -> Any:
    """What a trainer of trl needs after it is made."""
    trainer.recipe, trainer.recipe_train = recipe, recipe.train
    trainer.health = Health(recipe.stage, vocabulary(trainer.model))
    trainer.loraplus_lr_ratio = getattr(recipe.adapter, "loraplus_lr_ratio", None)
    trainer.remove_callback(PrinterCallback)  # Recorder prints
    return trainer


def fit(trainer: Any, run: Run, checkpoint: Path | None, inputs: dict[str, str]) -> dict[str, Any]:
    """Train; returns what result.json says about it. Interrupted after a signal, with a checkpoint on disk.

    Args:
        checkpoint: where to go on from; inputs: what the run reads, of `known_inputs`, kept in the checkpoints.
    """
    if checkpoint is not None:
        run.forget_after(int(checkpoint.name.rpartition("-")[2]))
    trainer.inputs = inputs
    trainer.doing = next(c.progress.doing for c in trainer.callback_handler.callbacks if isinstance(c, Recorder))
    trainer.add_callback(LongestFirst(trainer))
    trainer.add_callback(CountOn(trainer, checkpoint))
    found = trainer.callback_handler.callbacks
    guard, proven, recorder = (next(c for c in found if isinstance(c, kind)) for kind in (Guard, Proven, Recorder))
    recorder.tokens = known_of(checkpoint).get("counters", {}).get("tokens", 0) if checkpoint is not None else 0
    try:
        output = with_rows(trainer, run, str(checkpoint) if checkpoint else None)
        step = trainer.state.global_step
        if guard.stopped:
            where = f"checkpoint saved in {run.checkpoints}"
            raise Interrupted(f"stopped at step {step}; {where}; go on with {to_go_on(trainer.recipe)}")
        if proven.left_out and not proven.steps:
            what = f"loss scaling has left out all {proven.left_out} steps: nothing was trained"
            raise RunError(f"{what}; take more steps, or set model.dtype: bfloat16 or float32")
        check_finite(trained(trainer.model), "at the end")
        proof, failed = proven.finish(), proven.failed or trainer.failed
        held_out = {} if failed else of_the_saved_weights(trainer, run)
    finally:
        guard.restore()  # a trainer that raises calls no on_train_end
    return {
        **({"status": "failed", "failed": failed} if failed else {}), "trained": proof,
        "train_loss": output.training_loss, "steps": step, "epochs": round(trainer.state.epoch or 0.0, 4),
        "seconds": round(time.perf_counter() - trainer.begun, 2),
        "seen_tokens": int(trainer.state.num_input_tokens_seen or ranks.total(trainer._total_train_tokens)),
        "best_checkpoint": trainer.state.best_model_checkpoint, "eval": held_out,
    }  # fmt: skip


def with_rows(trainer: Any, run: Run, checkpoint: str | None) -> Any:
    """All steps. RunError of a step that went wrong names its rows."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except RunError as error:
        step = trainer.state.global_step
        if (
            not ranks.first()
            or trainer.in_batch is None
            or not step
            or f"step {step}" not in str(error)
            or "eval_" in str(error)
        ):
            raise
        said = str(error)
        message = with_batch(said, trainer.in_batch(step), run)
        raise type(error)(message) from None


def of_the_saved_weights(trainer: Any, run: Run) -> dict[str, float]:
    """The evaluation of the weights that the model holds now: the best or the last; {} without held-out rows."""
    wanted = trainer.measured()
    if not wanted:
        return {}
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = int(best.rpartition("-")[2]) if best else trainer.state.global_step
    metrics = ranks.from_first(run.read_metrics)
    rows = [row for row in metrics if row.get("step") == step and wanted <= row.keys()]
    row = rows[-1] if rows else evaluated(trainer, step)
    timed = ("_runtime", "_per_second", "_time")
    return {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_") and not k.endswith(timed)}


def evaluated(trainer: Any, step: int) -> dict[str, float]:
    """All held-out figures of the weights that the model holds, which metrics.jsonl has at the step they are of."""
    state = trainer.state
    last, epoch = state.global_step, state.epoch
    try:
        state.global_step, state.epoch = step, (epoch or 0.0) * step / max(last, 1)
        found: dict[str, float] = trainer.evaluate_all()
    finally:
        state.global_step, state.epoch = last, epoch
    return found
