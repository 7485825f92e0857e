"""What happens during training besides training: records, checkpoints, proofs, signals."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from finetune.adapters import ranks
from finetune.adapters.proof import Proof
from finetune.adapters.state import save_state
from finetune.errors import RunError
from finetune.models.hardware import peak_memory_gb
from finetune.progress import Progress
from finetune.recipe import AdaLoraAdapter
from finetune.run import CHECKPOINT_COMPLETE, Run


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and feeds the progress display."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress, self.tokens = run, progress, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.start(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
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
        row = {
            key: value
            for key, value in row.items()
            if not key.endswith(("_runtime", "_per_second")) or key == "tokens_per_second"
        }
        self.run.append_metrics(row)
        self.progress.log(row)
        for key in ("loss", "grad_norm", "eval_loss"):
            if key in row and not math.isfinite(float(row[key])):
                advice = "lower train.learning_rate, look at the data with `ft data check`, or set model.dtype: float32"
                raise RunError(f"{key} became {row[key]} at step {state.global_step}: {advice}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stop()


class Checkpoints(TrainerCallback):
    """Marks a checkpoint as complete once everything is in it."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_state(model, folder)
        (folder / CHECKPOINT_COMPLETE).touch()


class Proven(TrainerCallback):
    """Follows what is trained (see `adapters.proof`). Sharded gradients (FSDP, DeepSpeed) are not looked at."""

    def __init__(self) -> None:
        self.proof: Proof | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not args.deepspeed and not args.fsdp:
            self.proof = Proof(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.proof is not None and self.proof.watching:
            self.proof.look()
            if not getattr(optimizer, "step_was_skipped", False):  # by fp16's loss scaling
                self.proof.count(max(group["lr"] for group in optimizer.param_groups))


class Ranks(TrainerCallback):
    """AdaLoRA: share out the ranks after every step, while the gradients are still there."""

    def __init__(self, section: AdaLoraAdapter) -> None:
        self.section = section

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        ranks.plan(model, self.section, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        ranks.allocate(model, state.global_step + 1)


class Guard(TrainerCallback):
    """SIGINT and SIGTERM: finish the step, save a checkpoint, stop. A second signal stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        def stop(number: int, frame: Any) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True

        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        while self.before:
            signal.signal(*self.before.popitem())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control
