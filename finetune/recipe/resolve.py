"""`resolve` fills in what depends on the machine; nothing changes a recipe afterwards. No torch."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from finetune.errors import Problem
from finetune.python_files import is_function
from finetune.recipe.sections import EvalConfig, EvalSet, OutputConfig, SourceConfig, TrainConfig, as_list
from finetune.recipe.stages import PpoRecipe, R, Recipe, RewardSources


@dataclass(frozen=True)
class Hardware:
    """What `resolve` needs to know of the machine."""

    device: Literal["cpu", "cuda", "mps", "xpu"] = "cpu"
    bf16: bool = False
    """Fast bfloat16 matrix products."""
    memory_gb: float = 0.0
    """Memory of one device."""
    processes: int = 1
    """Data-parallel processes."""
    rows: int | None = None
    """Rows of this recipe that there is memory for in a pass, 0 for none; None: not known."""


def absolute(path: str, exists_only: bool = True) -> str:
    """Absolute path of a local file or folder; anything else (builtin:…, hub ids) unchanged."""
    if path.startswith("builtin:") or (exists_only and not Path(path).expanduser().exists()):
        return path
    return str(Path(path).expanduser().resolve())


def absolute_data(path: str) -> str:
    """The same data, found from any folder; globs, too. What names a file or folder as it stands is no pattern."""
    place = Path(path).expanduser()
    if path.startswith("builtin:") or place.exists() or not glob.has_magic(path):
        return absolute(path)
    return str(Path(glob.escape(str(Path.cwd()))) / place)


REMOTE = ("hub", "modelscope")


def absolute_source(source: str | SourceConfig) -> str | SourceConfig:
    if isinstance(source, SourceConfig):
        return source if source.source in REMOTE else source.model_copy(update={"path": absolute_data(source.path)})
    return absolute_data(source)


def absolute_rewards(reward: RewardSources) -> RewardSources:
    """The same, found from any folder."""
    rules = [
        f"{absolute(file)}:{name}" if file else name  # without a function the rule is refused when it is loaded
        for file, _, name in (rule.rpartition(":") for rule in reward.functions)
    ]
    train, model = [absolute_source(s) for s in as_list(reward.train)], reward.model and absolute(reward.model)
    return reward.model_copy(update={"train": train or None, "model": model, "functions": rules})


def absolute_eval(section: EvalConfig) -> EvalConfig:
    """The same, found from any folder."""
    names = section.metrics and [absolute_function(name) for name in section.metrics]
    drawn = {"shots_from": section.shots_from and absolute_data(section.shots_from)}
    during = section.during
    if during is not None and during.metrics:
        during = during.model_copy(update={"metrics": [absolute_function(name) for name in during.metrics]})
    return section.model_copy(update={"data": absolute_sets(section.data), "metrics": names, "during": during, **drawn})


def absolute_sets(data: Any) -> Any:
    """eval.data in the shape that it has."""
    if isinstance(data, EvalSet):
        return data.model_copy(update={"path": absolute_data(data.path)})
    if isinstance(data, list):
        return [absolute_sets(one) for one in data]
    if isinstance(data, dict):
        return {name: absolute_sets(one) for name, one in data.items()}
    return data and absolute_data(data)


def absolute_function(name: str) -> str:
    """file.py:function from any folder; a name or a regular expression as it is."""
    file, _, function = name.rpartition(":")
    return f"{absolute(file)}:{function}" if is_function(name) else name


def compute_dtype(wanted: str, hardware: Hardware) -> str:
    if wanted != "auto":
        return wanted
    if hardware.bf16:
        return "bfloat16"
    return "float16" if hardware.device == "cuda" else "float32"


def a_step(recipe: Recipe) -> tuple[TrainConfig, int]:
    """(train with the rows of an optimizer step, their length). PPO's are a minibatch of prompts and replies."""
    if not isinstance(recipe, PpoRecipe):
        return recipe.train, recipe.data.max_length
    rows = recipe.train.effective_batch_size // recipe.ppo.num_mini_batches
    train = recipe.train.model_copy(update={"effective_batch_size": rows})
    return train, recipe.data.max_length + recipe.ppo.max_new_tokens


UNPLANNED = 4096
"""Tokens of a pass where nothing is known of the model."""


def batch_layout(train: TrainConfig, max_length: int, hardware: Hardware) -> tuple[int, int]:
    """(rows per forward pass, forward passes per optimizer step of one process); × processes = effective_batch_size.

    gradient_accumulation_steps counts the passes of all processes: they share them.
    """
    processes, given = hardware.processes, train.per_device_train_batch_size
    per_process = max(1, train.effective_batch_size // processes)
    shared = train.gradient_accumulation_steps and max(1, train.gradient_accumulation_steps // processes)
    if given and shared:
        return given, shared
    if given:
        return given, max(1, round(per_process / given))
    if shared:
        return max(1, round(per_process / shared)), shared
    limit = max(1, UNPLANNED // max_length if hardware.rows is None else hardware.rows)
    micro = max(n for n in range(1, per_process + 1) if per_process % n == 0 and n <= limit)
    return micro, per_process // micro


def processes_problem(recipe: Recipe, processes: int) -> Problem | None:
    """Why the rows of a step cannot be shared out evenly over so many processes."""
    train, (rows, what) = recipe.train, recipe.step_rows()
    key, given, passes = "train.", train.per_device_train_batch_size, train.gradient_accumulation_steps
    if rows % processes:
        fix = f"use a multiple of {processes}, or another number of processes"
        return Problem(f"{what} of {rows} cannot be shared out evenly over {processes} processes",
                       key=f"{key}effective_batch_size", fix=fix)  # fmt: skip
    if given and not recipe.data.packing and rows % (given * processes):
        fix = f"set it to a divisor of {rows // processes}, or leave it and gradient_accumulation_steps out"
        return Problem(f"{given} rows in each of {processes} processes do not divide {what} of {rows}",
                       key=f"{key}per_device_train_batch_size", fix=fix)  # fmt: skip
    if passes and passes % processes:
        return Problem(f"{passes} passes of a step cannot be shared out over {processes} processes",
                       key=f"{key}gradient_accumulation_steps", fix="leave it out, or use a multiple")  # fmt: skip
    return None


def resolve(recipe: R, hardware: Hardware) -> R:
    """Fill in everything that depends on the machine.

    The result is complete: written to recipe.yaml and run again, it gives the same run from any folder.
    """
    model, train, data = recipe.model, recipe.train, recipe.data
    micro, accumulation = batch_layout(*a_step(recipe), hardware)
    best, during = recipe.keeps_best, recipe.eval.during
    at_saves = train.save_steps if best and recipe.eval_every is None else None
    evaluates = data.eval_split is not None and not isinstance(recipe, PpoRecipe)
    places = {
        "name": model.name if model.source in REMOTE else absolute(model.name),
        "adapter": model.adapter and absolute(model.adapter),
        "chat_template": model.chat_template and absolute(model.chat_template),
        "offload_folder": model.offload_folder and absolute(model.offload_folder, exists_only=False),
    }
    steps = {
        # How many samples a packed row holds is known only once they are packed.
        "per_device_train_batch_size": train.per_device_train_batch_size if data.packing else micro,
        # Of all processes together: the same recipe goes on with another number of them.
        "gradient_accumulation_steps": (
            train.gradient_accumulation_steps if data.packing else accumulation * hardware.processes
        ),
        "per_device_eval_batch_size": (train.per_device_eval_batch_size or micro) if evaluates else None,
        "gradient_checkpointing": (
            hardware.device != "cpu" if train.gradient_checkpointing is None else train.gradient_checkpointing
        ),
        "load_best_model_at_end": best,
        # The best model can only be kept where it was evaluated.
        "save_steps": train.save_steps or (recipe.best_every if best else None),
        "eval_steps": train.eval_steps or at_saves,
    }
    if during is not None and at_saves:
        during = during.model_copy(update={"steps": at_saves})
    sections: dict[str, Any] = {
        "model": model.model_copy(update={**places, "dtype": compute_dtype(model.dtype, hardware)}),
        "data": data.model_copy(update={"train": [absolute_source(s) for s in as_list(data.train)]}),
        "train": train.model_copy(update=steps),
        "eval": absolute_eval(recipe.eval.model_copy(update={"during": during})),
        "output": OutputConfig(dir=absolute(recipe.output.dir, exists_only=False)),
    }
    if isinstance(recipe, PpoRecipe):
        sections["reward"] = absolute_rewards(recipe.reward)
    return cast("R", recipe.model_copy(update=sections))
