"""How a run is cut into steps, and what transformers is told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from finetune import ranks
from finetune.adapters.methods import METHODS
from finetune.errors import UserError
from finetune.recipe.resolve import Hardware, batch_layout
from finetune.recipe.stages import PpoRecipe, Recipe
from finetune.run.directory import Run
from finetune.training import sharded
from finetune.training.optim import OPTIMIZERS, check_schedule, scheduler_kwargs, warmup_steps

FEW_UPDATES = 50  # below this a learning-rate schedule has hardly begun


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
        each = hardware.processes
        wanted = max(1, round(train.effective_batch_size / per_row))
        if wanted % each:
            even = math.ceil(math.ceil(wanted / each) * each * per_row)
            what = f"a step of {wanted} packed rows cannot be shared out evenly over {each} processes"
            raise UserError(what, key="train.effective_batch_size", fix=f"set it to {even}, or use one process")
        train = train.model_copy(update={"effective_batch_size": wanted})
    micro, accumulation = batch_layout(train, recipe.data.max_length, hardware)
    per_epoch = max(1, math.ceil(math.ceil(rows / (micro * hardware.processes)) / accumulation))
    total = train.max_steps or math.ceil(per_epoch * train.num_train_epochs)
    check_schedule(train, total)
    if METHODS[recipe.adapter.method].cuts_ranks and total < 2:
        what = "ranks are shared out between the first step and the last, and the run has one"
        raise UserError(what, key="train.max_steps", fix="take 2 steps or more")
    during = recipe.eval.during
    found = {"train.eval_steps": recipe.data.eval_split is not None and train.eval_steps,
             "eval.during.steps": during is not None and during.steps}  # fmt: skip
    for key, every in found.items():
        if every and every > total:
            what = f"{every} steps between evaluations, and the run has {total}: there would be none"
            raise UserError(what, key=key, fix="lower it, or leave it out (then it is at the end of every epoch)")
    return Layout(micro, accumulation, per_epoch, total)


def rollouts(recipe: PpoRecipe, prompts: int) -> tuple[int, int, int]:
    """(prompts per rollout, rollouts per epoch, rollouts of the run). An epoch's last prompts, too few for a rollout,
    are left out of it; every epoch leaves out others."""
    parts = recipe.ppo.num_mini_batches * ranks.count()
    batch = min(recipe.train.effective_batch_size, prompts // parts * parts)
    per_epoch = prompts // batch
    return batch, per_epoch, recipe.train.max_steps or max(1, round(per_epoch * recipe.train.num_train_epochs))


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
    if count < 2 or recipe.model.device_map is not None or ranks.count() > 1:
        return None
    all_of_them = f"--launch ddp --num-processes {count} uses all"
    return f"{count} GPUs are here and one is used (CUDA_VISIBLE_DEVICES chooses which); {all_of_them}"


def arguments(
    recipe: Recipe,
    run: Run,
    plan: Layout,
    hardware: Hardware,
    has_eval: bool,
    best: tuple[str, bool] = ("loss", False),
    once: bool = False,
) -> dict[str, Any]:
    """transformers' TrainingArguments of a resolved recipe.

    best: what the best checkpoint is best in, and whether higher is better; once: whether one process alone has read
    weights that lie in parts.
    """
    train = recipe.train
    steps = "steps" if recipe.eval_every else "epoch"
    keep_best, fused = train.load_best_model_at_end and has_eval, train.optim == "adamw" and hardware.device == "cuda"
    fused = fused and not ranks.side_by_side()  # one kernel takes no mixture of whole tensors and parts
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
        "optim": "adamw_torch_fused" if fused else OPTIMIZERS[train.optim],
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
        "eval_steps": recipe.eval_every,
        "prediction_loss_only": True,  # accumulated logits are how evaluation runs out of memory
        "save_strategy": "steps" if train.save_steps else "epoch",
        "save_steps": train.save_steps or 500,
        "save_total_limit": None,  # `Checkpointing` takes old ones away, once the new one is complete
        "load_best_model_at_end": keep_best,
        "metric_for_best_model": f"eval_{best[0]}" if keep_best else None,
        "greater_is_better": best[1] if keep_best else None,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
        **launched(hardware, once),
    }


def launched(hardware: Hardware, once: bool = False) -> dict[str, Any]:
    """What transformers is told where there are several processes."""
    if hardware.processes == 1 and ranks.count() == 1:
        return {}
    return {
        **sharded.arguments(once),
        "ddp_backend": "gloo" if hardware.device == "cpu" else None,
        "accelerator_config": {"even_batches": False},  # `sampler.SharedBatches` shares the rows out
    }


def pad_multiple(hardware: Hardware) -> int:
    """Rows are padded to a multiple of this: few different shapes. On CPUs oneDNN compiles a kernel per shape, on GPUs
    8 fits the tensor cores."""
    return 32 if hardware.device == "cpu" else 8


def longest_row(rows: Any) -> int:
    """Tokens of the longest sample; of an unpaired one, prompt and completion."""
    import pyarrow.compute

    names = [name for name in rows.column_names if name.endswith("_ids")]
    lengths = [pyarrow.compute.list_value_length(rows.data.column(name)) for name in names]
    if "completion_ids" in names:
        lengths = [pyarrow.compute.add(*lengths)]
    return max(int(pyarrow.compute.max(column).as_py() or 0) for column in lengths)
