"""What every training stage shares: batches, the trainer and its arguments, the end of a run.

A stage reads top to bottom: check -> load -> make the trainer -> `fit` -> `save` -> `finish`. The trainers are those of
trl with a few additions (`trainers`); what happens beside training is in `callbacks`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from finetune import report
from finetune.adapters import limits, soft_prompts
from finetune.adapters.build import adapter_config
from finetune.adapters.build import save as save_adapter
from finetune.adapters.limits import AnyRecipe
from finetune.callbacks import Checkpoints, Guard, Proven, Ranks, Recorder
from finetune.errors import Interrupted, RunError, UserError
from finetune.models import loading, sources
from finetune.models.hardware import peak_memory_gb
from finetune.models.identity import fingerprint, write_identity
from finetune.models.quantization import parameter_counts
from finetune.optim import OPTIMIZERS, check_schedule, scheduler_kwargs, warmup_steps
from finetune.progress import Progress, duration, note, warn
from finetune.recipe import AdaLoraAdapter, Hardware, ModelConfig, Recipe, batch_layout, resolve
from finetune.recipe_file import to_yaml
from finetune.run import Run
from finetune.trainers import Collator, Sft

FEW_UPDATES = 50  # below this a learning-rate schedule has hardly begun


def resolved(raw: AnyRecipe, machine: Hardware) -> AnyRecipe:
    """The complete recipe. UserError when it says something else of model.adapter than that adapter's own files."""
    sources.check(raw.model)
    recipe = resolve(raw, machine)
    start = getattr(getattr(recipe, recipe.stage, None), "start", "continue")
    if recipe.model.adapter is None or start == "merge":
        return recipe
    folder = loading.adapter_folder(recipe.model.adapter)
    return limits.continued(recipe, adapter_config(folder), folder)


@dataclass(frozen=True)
class Layout:
    """How many rows make a step."""

    rows_per_pass: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int


def layout(recipe: Recipe, samples: int, rows: int, hardware: Hardware) -> Layout:
    """Rows per pass and accumulation, so that a step holds effective_batch_size original samples.

    Args:
        samples: original samples; rows: rows of the dataset, fewer than samples when packed.
    """
    train = recipe.train
    if rows < samples:  # a packed row holds several samples: fewer rows make a step
        per_row = samples / rows
        wanted = max(1, round(train.effective_batch_size / per_row))
        train = train.model_copy(update={"effective_batch_size": wanted})
    micro, accumulation = batch_layout(train, recipe.data.max_length, hardware)
    per_epoch = max(1, math.ceil(math.ceil(rows / (micro * hardware.processes)) / accumulation))
    total = train.max_steps or math.ceil(per_epoch * train.num_train_epochs)
    check_schedule(train, total)
    every = train.eval_steps
    if recipe.data.eval_split is not None and every is not None and every > total:
        raise UserError(
            f"{every} steps between evaluations, and the run has {total}: there would be none", key="train.eval_steps",
            fix="lower it, or leave it out (then it is at the end of every epoch)",
        )  # fmt: skip
    return Layout(micro, accumulation, per_epoch, total)


def few_updates(updates: int) -> str | None:
    """A warning when the run is too short to learn from."""
    if updates >= FEW_UPDATES:
        return None
    return f"only {updates} updates; {FEW_UPDATES} or more want more data or epochs, or a smaller batch"


def few_rows(recipe: Recipe, samples: int) -> str | None:
    """A note when a step cannot hold as many samples as it should."""
    wanted = recipe.train.effective_batch_size
    if samples >= wanted:
        return None
    return f"{samples} training rows are fewer than train.effective_batch_size {wanted}: a step holds {samples}"


def one_device(config: Any) -> Any:
    """transformers' arguments for one process on one device: it would split batches over all GPUs that it sees
    (DataParallel), each with a whole batch of its own."""
    config._n_gpu = min(1, config.n_gpu)
    return config


def other_devices(recipe: Recipe) -> str | None:
    """A note when there are GPUs that are not used."""
    count = torch.cuda.device_count()
    if count < 2 or recipe.model.device_map is not None:
        return None
    return f"{count} GPUs are here and one is used (CUDA_VISIBLE_DEVICES chooses which)"


def arguments(recipe: Recipe, run: Run, plan: Layout, hardware: Hardware, has_eval: bool) -> dict[str, Any]:
    """transformers' TrainingArguments of a resolved recipe."""
    train = recipe.train
    steps = "steps" if train.eval_steps else "epoch"
    return {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": plan.rows_per_pass,
        "per_device_eval_batch_size": train.per_device_eval_batch_size or plan.rows_per_pass,
        "gradient_accumulation_steps": plan.accumulation,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_kwargs(train, plan.total_steps),
        "warmup_steps": warmup_steps(train, plan.total_steps),
        "max_grad_norm": train.max_grad_norm,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch_fused"
        if train.optim == "adamw" and hardware.device == "cuda"
        else OPTIMIZERS[train.optim],
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "label_smoothing_factor": train.label_smoothing_factor,
        "activation_checkpointing": bool(train.gradient_checkpointing),
        # Re-entrant checkpointing gives "element 0 does not require grad" on frozen bases.
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "torch_compile": train.torch_compile,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "use_cpu": hardware.device == "cpu",
        "seed": train.seed,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "eval_strategy": steps if has_eval else "no",
        "eval_steps": train.eval_steps,
        "prediction_loss_only": True,  # accumulated logits are how evaluation runs out of memory
        "save_strategy": "steps" if train.save_steps else "epoch",
        "save_steps": train.save_steps or 500,
        "save_total_limit": train.save_total_limit,
        "load_best_model_at_end": train.load_best_model_at_end and has_eval,
        "metric_for_best_model": "eval_loss" if train.load_best_model_at_end and has_eval else None,
        "greater_is_better": False if train.load_best_model_at_end and has_eval else None,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def make_trainer(
    recipe: Recipe,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Any,
    eval_rows: Any | None,
    plan: Layout,
    hardware: Hardware,
) -> SFTTrainer:
    """trl's SFTTrainer over encoded rows (input_ids, labels and, when packed, seq_lengths)."""
    packed = "seq_lengths" in train_rows.column_names
    config = SFTConfig(
        **arguments(recipe, run, plan, hardware, eval_rows is not None),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    one_device(config)
    trainer = Sft(
        model=model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=Collator(
            pad_token_id=tokenizer.pad_token_id,
            padding_free=packed,
            pad_to_multiple_of=None if packed else pad_multiple(hardware),
        ),
        callbacks=callbacks(recipe, run, eval_rows is not None),
    )
    return finish_setup(trainer, recipe)


def pad_multiple(hardware: Hardware) -> int:
    """Rows are padded to a multiple of this: few different shapes. On CPUs oneDNN compiles a kernel per shape, on GPUs
    8 fits the tensor cores."""
    return 32 if hardware.device == "cpu" else 8


def callbacks(recipe: Recipe, run: Run, has_eval: bool) -> list[TrainerCallback]:
    """What happens beside training, for any trainer."""
    found: list[TrainerCallback] = [Recorder(run, Progress(recipe.stage)), Checkpoints(), Guard(), Proven()]
    if isinstance(recipe.adapter, AdaLoraAdapter):
        found.append(Ranks(recipe.adapter))
    if recipe.train.early_stopping_patience and has_eval:
        found.append(EarlyStoppingCallback(early_stopping_patience=recipe.train.early_stopping_patience))
    return found


def finish_setup(trainer: Any, recipe: Recipe) -> Any:
    """What a trainer of trl needs after it is made."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl casts those on quantized bases to bfloat16, where small updates round away
            parameter.data = parameter.data.float()
    trainer.recipe_train = recipe.train
    trainer.loraplus_lr_ratio = getattr(recipe.adapter, "loraplus_lr_ratio", None)
    trainer.remove_callback(PrinterCallback)  # Recorder prints
    return trainer


def longest_row(rows: Any) -> int:
    """Tokens of the longest sample; of an unpaired one, prompt and completion."""
    import pyarrow.compute

    names = [name for name in rows.column_names if name.endswith("_ids")]
    lengths = [pyarrow.compute.list_value_length(rows.data.column(name)) for name in names]
    if "completion_ids" in names:
        lengths = [pyarrow.compute.add(*lengths)]
    return max(int(pyarrow.compute.max(column).as_py() or 0) for column in lengths)


def announce(warnings: list[str], updates: int, *more: str | None) -> list[str]:
    """Say what was found before training; the same lines go to result.json."""
    lines = [*warnings, *(line for line in (*more, few_updates(updates)) if line)]
    for line in lines:
        warn(line)
    return lines


@contextmanager
def memory_advice(length: str) -> Iterator[None]:
    """RunError that says what to do when memory runs out. `length`: the key of how long rows may be."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory ({str(error).splitlines()[0]}): set train.per_device_train_batch_size: 1, "
                       f"train.gradient_checkpointing: true, or a shorter {length}") from None  # fmt: skip


def fit(trainer: SFTTrainer, run: Run, resume: bool) -> dict[str, Any]:
    """Train; returns what result.json says about it. Interrupted after a signal, with a checkpoint on disk."""
    checkpoint = run.last_checkpoint() if resume else None
    if checkpoint is not None:
        run.forget_after(int(checkpoint.name.rpartition("-")[2]))
    guard = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Guard))
    try:
        with memory_advice("data.max_length"):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        guard.restore()  # a trainer that raises calls no on_train_end
    if guard.stopped:
        step = trainer.state.global_step
        raise Interrupted(f"stopped at step {step}; checkpoint saved in {run.checkpoints}; go on with --resume")
    proven = next((c for c in trainer.callback_handler.callbacks if isinstance(c, Proven)), None)
    return {
        "trained": proven.proof.finish() if proven is not None and proven.proof is not None else None,
        "train_loss": output.training_loss,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "seconds": round(output.metrics["train_runtime"], 2),
        "seen_tokens": int(trainer.state.num_input_tokens_seen or trainer._total_train_tokens),
        "best_checkpoint": trainer.state.best_model_checkpoint,
    }


def start(recipe: Recipe) -> None:
    """Seed everything; before any weight is initialised."""
    set_seed(recipe.train.seed)


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Dtype in which the base is held: that of the computation, but float32 where all of it is trained."""
    return torch.float32 if recipe.adapter.method == "full" else getattr(torch, recipe.model.dtype)


@torch.no_grad()
def documents_isolated(model: PreTrainedModel, ids: list[int]) -> bool:
    """Whether documents packed into one row are invisible to each other, found by trying.

    Two documents share a row, told apart by position ids alone. If changing the first changes the logits of the
    second, attention (or virtual tokens, or ALiBi) leaks, whatever the documentation says.
    """
    half = len(ids) // 2
    positions = torch.tensor([[*range(half), *range(len(ids) - half)]], device=model.device)
    changed = [(i + 1) % 256 for i in ids[:half]] + ids[half:]
    was_training = model.training
    model.eval()
    try:
        rows = [torch.tensor([row], device=model.device) for row in (ids, changed)]
        # As in training: what is trained is float32, also on a bfloat16 base.
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            a, b = (model(input_ids=row, position_ids=positions, use_cache=False).logits for row in rows)
    finally:
        model.train(was_training)
    return bool(a.shape[1] == len(ids)) and bool(torch.equal(a[:, half:], b[:, half:]))


def pack_if_isolated(recipe: Recipe, model: PreTrainedModel, tokenizer: Any, rows: Any) -> tuple[Any, str | None]:
    """(rows, packed if asked for and safe; one line saying why not)."""
    if not recipe.data.packing:
        return rows, None
    if soft_prompts.peft_type(model) in soft_prompts.TYPES:
        return rows, "packing is off: documents in one row would share the virtual tokens and see each other"
    from finetune.data.packing import pack

    sample = [i for ids in rows[: min(len(rows), 64)]["input_ids"] for i in ids][:64]
    sample = (sample * 64)[:32] if len(sample) < 32 else sample
    if not documents_isolated(model, sample):
        return rows, "packing is off: documents in one row would see each other with this model and adapter"
    return pack(rows, recipe.data.max_length), None


def save(
    recipe: Recipe,
    run: Run,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    base: ModelConfig | None = None,
) -> Path:
    """adapter/ in PEFT's format, or model/ after full fine-tuning, with tokenizer, template and the base's identity.

    base: what the adapter sits on, where that is not recipe.model.
    """
    base = base or recipe.model
    if template is not None:
        tokenizer.chat_template = template
    if recipe.adapter.method == "full":
        model.to(getattr(torch, recipe.model.dtype)).save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        return run.model
    save_adapter(model, run.adapter)
    tokenizer.save_pretrained(run.adapter)
    write_identity(run.adapter, base, fingerprint(loading.folder(base)), template)
    return run.adapter


def finish(
    recipe: Recipe, run: Run, trainer: SFTTrainer, outcome: dict[str, Any], counts: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """loss.png, report.html and, last, result.json."""
    trainable, total = parameter_counts(trainer.model)
    held_out = [row for row in run.read_metrics() if "eval_loss" in row]
    result = {
        "stage": recipe.stage,
        "status": "done",
        **outcome,
        "eval": outcome.get("eval")
        or ({k.removeprefix("eval_"): v for k, v in held_out[-1].items() if k.startswith("eval_")} if held_out else {}),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trained_tokens": counts["trained_tokens"],
        "dropped_rows": counts["dropped"],
        "data": counts,
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "decisions": notes,
    }
    report.write(run, result)
    run.finish(result)
    return result


def shown_path(path: str | Path) -> str:
    """Relative to the working directory where that is shorter to type."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def gist(result: dict[str, Any]) -> str:
    """The figure of a run that says most."""
    held_out = result["eval"]
    if "reward_difference" in held_out:
        low, high = held_out["reward_difference_ci"]
        change = f"{held_out['reward_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"held-out reward {held_out['reward_before']:.3f} -> {held_out['reward_mean']:.3f} ({change})"
    if "accuracy" in held_out:
        return f"held-out pair accuracy {held_out['accuracy']:.3f}"
    loss = f", held-out loss {held_out['loss']:.4f}" if "loss" in held_out else ""
    return f"training loss {result['train_loss']:.4f}{loss}"


def summary(recipe: Recipe, run: Run, weights: Path) -> None:
    """What was done, where it is, and what to type next."""
    result = json.loads(run.result.read_text(encoding="utf-8"))
    share = result["trainable_parameters"] / result["total_parameters"]
    note(f"done in {duration(result['seconds'])}: {result['steps']} steps, {gist(result)}")
    note(f"trained {result['trainable_parameters']:,} of {result['total_parameters']:,} parameters ({share:.2%})")
    note(f"weights {shown_path(weights)}   report {shown_path(run.path / 'report.html')}")
    name = shown_path(run.path)
    compare = "" if recipe.stage == "reward" else " --compare-base"
    note(f"next    ft eval {name}{compare}{'' if recipe.eval.data else ' --data FILE'}")
    if recipe.stage == "reward":
        note(f"        ft ppo --recipe R --set reward.model={name}")
        return
    option = "--model" if recipe.adapter.method == "full" else "--adapter"
    note(f"        ft chat {option} {name}")


def show_plan(recipe: Recipe, counts: dict[str, Any], plan: Layout, steps: str = "steps") -> None:
    """--dry-run: what would be done, as YAML that can be run."""
    print(to_yaml(recipe), end="")
    trained = f", {counts['trained_tokens']:,} trained tokens" if counts["trained_tokens"] else ""  # none in prompts
    note(f"{counts['rows']:,} rows{trained}, {counts['dropped']} dropped")
    note(f"{plan.total_steps} {steps} of {plan.rows_per_pass} rows x {plan.accumulation} passes; nothing was written")
