"""What happens during training besides training: records, proofs, signals."""

from __future__ import annotations

import math
import signal
import time
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from finetune import ranks
from finetune.adapters import adalora
from finetune.child import HANGUP, at_terminal, leave, stopping
from finetune.errors import RunError
from finetune.models.hardware import peak_memory_gb
from finetune.run.directory import Run
from finetune.terminal.progress import Progress
from finetune.training.health import ADVICE
from finetune.training.weight_check import Proof


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and feeds the progress display."""

    def __init__(self, run: Run, progress: Progress, may_stop: bool = False) -> None:
        """may_stop: whether an evaluation can end the run."""
        self.run, self.progress, self.may_stop, self.tokens, self.scored = run, progress, may_stop, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.progress.step(state.global_step)
        # The last step is always on record; an evaluation may be what ends the run (early stopping).
        control.should_log |= state.global_step >= state.max_steps or (self.may_stop and control.should_evaluate)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log |= self.may_stop and control.should_evaluate
        return control

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        self.scored += 1
        self.progress.doing(f"held-out batch {self.scored:,}/{len(eval_dataloader):,}", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.scored = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        if "train_runtime" in logs:  # the summary at the end; result.json has it
            return
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **logs}
        tokens = row.pop("num_tokens", None)
        if "loss" in row and tokens is not None:
            row["tokens_per_second"] = self.progress.rate(tokens - self.tokens)
            self.tokens = tokens
            row["num_tokens"] = tokens
        row["peak_memory_gb"] = round(peak_memory_gb(), 3)
        timed = ("_runtime", "_per_second")
        row = {key: value for key, value in row.items() if key == "tokens_per_second" or not key.endswith(timed)}
        if skipped(kwargs.get("optimizer")):
            row.pop("grad_norm", None)  # loss scaling has left the step out, by design
        self.run.append_metrics(row)
        self.progress.log(row)
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in row and not math.isfinite(float(row[key])):
                raise RunError(f"{key} became {row[key]} at step {state.global_step}: {ADVICE}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


class Proven(TrainerCallback):
    """Follows what is trained (see `weight_check`). Sharded gradients (FSDP, DeepSpeed) are not looked at."""

    def __init__(self) -> None:
        self.proof: Proof | None = None
        self.found: dict[str, Any] | None = None
        self.failed: str | None = None
        """What the proof found wrong."""
        self.steps = self.left_out = 0
        """Steps taken, and left out by loss scaling."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not args.deepspeed and not args.fsdp:
            self.proof = Proof(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if skipped(optimizer):
            self.left_out += 1
            check_scale(optimizer.scaler, state.global_step + 1)
            return
        self.steps += 1
        if self.proof is not None:
            self.proof.look()
            self.proof.count(max(group["lr"] for group in optimizer.param_groups))

    def finish(self) -> dict[str, Any] | None:
        """What the proof says of the weights that training ended with. The best may be older: those of a first step, at
        which LoRA's A stays as it is, or those that a resumed run began with."""
        if self.found is None and self.failed is None and self.proof is not None and self.proof.seen:
            try:
                self.found = self.proof.finish()
            except RunError as error:
                self.failed = str(error)
        return self.found


SMALLEST_SCALE = 1e-4


def skipped(optimizer: Any) -> bool:
    """Whether float16's loss scaling has left the last step out: its gradients were too large for the scale."""
    return bool(getattr(optimizer, "step_was_skipped", False))


def check_scale(scaler: Any, step: int) -> None:
    """RunError when steps are left out however small the scale: then it is not the scale."""
    if scaler.get_scale() < SMALLEST_SCALE:
        raise RunError(
            f"the gradients are not finite in float16 at step {step}, whatever the loss scale: "
            "set model.dtype: bfloat16 or float32"
        )


class Patience(EarlyStoppingCallback):
    """Counts the evaluations in which its metric is measured; others may come between them."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if args.metric_for_best_model in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class Ranks(TrainerCallback):
    """AdaLoRA: share out the ranks after every step, while the gradients are still there."""

    def __init__(self, section: Any) -> None:
        self.section = section

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        adalora.plan(model, self.section, state.max_steps)

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        if not skipped(optimizer):  # its gradients are no numbers
            adalora.allocate(model, state.global_step + 1)


PASSED_ON = 5.0
"""Seconds in which a second signal may be the first again: schedulers send it to all processes, and so do launchers."""


class Guard(TrainerCallback):
    """SIGINT, SIGTERM and SIGHUP: finish the step, save a checkpoint, stop. A second one stops at once, but for SIGHUP,
    which shells and the system send beside others."""

    def __init__(self) -> None:
        self.stopped = self.asked = False
        self.since = 0.0
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        terminals = at_terminal()

        def stop(number: int, frame: Any) -> None:
            if number == HANGUP:
                leave(terminals)
            elif not self.asked:
                self.asked, self.since = True, time.monotonic()
            elif ranks.count() == 1 or time.monotonic() - self.since > PASSED_ON:
                raise KeyboardInterrupt
            self.stopped = True

        for number in stopping():
            self.before[number] = signal.signal(number, stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.stopped = ranks.any_of(self.stopped)  # all stop at the same step
        if self.stopped:
            ends_epoch = state.epoch == int(state.epoch)
            # At the end of an epoch the evaluation that belongs there comes first, then its checkpoint.
            control.should_save |= not (ends_epoch and args.save_strategy == "epoch")
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopped and state.epoch != int(state.epoch):  # the epoch is not over: it goes on with --resume
            control.should_evaluate = control.should_save = False
        return control
