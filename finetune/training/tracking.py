"""`train.report_to`: transformers' own callbacks for trackers, started before the model is loaded, told the resolved
recipe as config and the result as summary. metrics.jsonl is written whatever becomes of them.

Where a tracker keeps or sends its figures is its own business: its environment variables say it (docs/trackers.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from finetune import ranks
from finetune.errors import UserError
from finetune.recipe.file import to_yaml
from finetune.recipe.stages import Recipe
from finetune.run.directory import Run
from finetune.run.records import flat, is_number
from finetune.terminal.progress import warn
from finetune.training.plan import one_device

KEY = "train.report_to"
FIX = {
    "wandb": "log in with `wandb login`, or keep it on this machine with WANDB_MODE=offline",
    "swanlab": "log in with `swanlab login`, or keep it on this machine with SWANLAB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server, or to file:PATH (mlflow-skinny has no database)",
}


class Trackers(TrainerCallback):
    """All trackers of a run. transformers' callbacks end a run with the training; here it ends with the result."""

    def __init__(self, recipe: Recipe, run: Run, arguments: Mapping[str, Any], resume: bool = False) -> None:
        """UserError when one cannot be started. arguments: transformers' TrainingArguments."""
        self.callbacks: dict[str, Any] = {}
        self.recipe, self.state, self.control = recipe, TrainerState(), TrainerControl()
        names = recipe.train.report_to
        if not names or not ranks.first():
            return
        self.args = one_device(TrainingArguments(**{**arguments, "run_name": run.path.name}))
        config = yaml.safe_load(to_yaml(recipe))
        for name in names:
            try:
                (kind,) = get_reporting_integration_callbacks([name])
                callback = kind(tensorboard(run, resume)) if name == "tensorboard" else kind()
                if name == "swanlab":
                    begin_swanlab(run.path.name)
                callback.on_train_begin(self.args, self.state, self.control, model=None)
                CONFIGURED[name](callback, config, to_yaml(recipe))
            except Exception as error:  # of the tracker's own kinds
                self.finish(None)
                raise UserError(f"{name}: {first_line(error)}", key=KEY, fix=FIX.get(name)) from error
            self.callbacks[name] = callback

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.log(logs or {}, state.global_step)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """A row of metrics.jsonl. A tracker that fails is left out from then on: the run goes on."""
        self.state.global_step = step
        values = {key: value for key, value in ends_apart(row).items() if key not in ("step", "epoch")}
        for name in list(self.callbacks):
            self.told(name, lambda c: c.on_log(self.args, self.state, self.control, logs=dict(values)))

    def told(self, name: str, tell: Callable[[Any], Any]) -> None:
        try:
            tell(self.callbacks[name])
        except Exception as error:
            warn(f"{name} is left out from here on ({first_line(error)}); metrics.jsonl goes on")
            del self.callbacks[name]

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """With the result of the run; None where it has none, and failed or was interrupted."""
        figures = {}
        if result is not None:
            kept = {key: result[key] for key in SUMMARY if key in result}
            figures = {f"result/{key}": value for key, value in flat(ends_apart_in(kept)).items() if is_number(value)}
        for name in list(self.callbacks):
            self.told(name, lambda c: FINISHED[name](c, self, figures, result))  # noqa: B023 (called at once)
        self.callbacks.clear()


SUMMARY = (
    "eval", "train_loss", "steps", "epochs", "seconds", "trainable_parameters", "total_parameters", "trained_tokens",
    "dropped_rows", "peak_memory_gb",
)  # fmt: skip


def tensorboard(run: Run, resume: bool) -> Any:
    """A writer into the run directory, or None where its package will have to say what is missing. Of a run that goes
    on the steps that it takes again are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    last = run.last_checkpoint() if resume else None
    step = None if last is None else int(last.name.rpartition("-")[2]) + 1
    return SummaryWriter(log_dir=str(run.path / "tensorboard"), purge_step=step)


def begin_swanlab(name: str) -> None:
    """transformers 5.23 asks swanlab for its run before it starts one, and from 0.10 on that raises."""
    import swanlab

    if not swanlab.has_run():
        swanlab.init(experiment_name=name)


# --- the recipe as config ---


def _text(callback: Any, config: dict[str, Any], recipe: str) -> None:
    indented = "".join(f"    {line}\n" for line in recipe.splitlines())  # Markdown's way of showing it as it is
    callback.tb_writer.add_text("recipe", indented)


def _wandb_config(callback: Any, config: dict[str, Any], recipe: str) -> None:
    callback._wandb.config.update({"recipe": config}, allow_val_change=True)
    if callback._log_model.is_enabled:
        warn("WANDB_LOG_MODEL has no effect: figures are reported, weights stay in the run directory")


def _mlflow_config(callback: Any, config: dict[str, Any], recipe: str) -> None:
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

    values = [(f"recipe.{key}", str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in flat(config).items()]
    for start in range(0, len(values), MAX_PARAMS_TAGS_PER_BATCH):
        callback._ml_flow.log_params(dict(values[start : start + MAX_PARAMS_TAGS_PER_BATCH]))
    callback._ml_flow.log_text(recipe, "recipe.yaml")


CONFIGURED: dict[str, Callable[[Any, dict[str, Any], str], None]] = {
    "tensorboard": _text,
    "wandb": _wandb_config,
    "swanlab": lambda c, config, _: c._swanlab.config.update({"recipe": config}),
    "trackio": lambda c, config, _: c._trackio.config.update({"recipe": config}, allow_val_change=True),
    "mlflow": _mlflow_config,
}

# --- the result as summary, and the end ---

Figures = Mapping[str, float]


def _finish_tensorboard(c: Any, trackers: Trackers, figures: Figures, result: Any) -> None:
    for key, value in figures.items():
        c.tb_writer.add_scalar(key, value, trackers.state.global_step)
    c.on_train_end(trackers.args, trackers.state, trackers.control)


def _finish_wandb(c: Any, trackers: Trackers, figures: Figures, result: Any) -> None:
    c._wandb.run.summary.update(dict(figures))
    c._wandb.finish(exit_code=0 if result is not None else 1)


def _finish_swanlab(c: Any, trackers: Trackers, figures: Figures, result: Any) -> None:
    if figures:
        c._swanlab.log(dict(figures), step=trackers.state.global_step)
    c._swanlab.finish(state="success" if result is not None else "crashed")


def _finish_trackio(c: Any, trackers: Trackers, figures: Figures, result: Any) -> None:
    if figures:
        c._trackio.log(dict(figures))
    c.on_train_end(trackers.args, trackers.state, trackers.control)


def _finish_mlflow(c: Any, trackers: Trackers, figures: Figures, result: Any) -> None:
    if result is not None:
        c._ml_flow.log_metrics(dict(figures), step=trackers.state.global_step)
        c._ml_flow.log_dict(dict(result), "result.json")
    c._ml_flow.end_run("FINISHED" if result is not None else "FAILED")


FINISHED: dict[str, Callable[[Any, Trackers, Figures, Any], None]] = {
    "tensorboard": _finish_tensorboard, "wandb": _finish_wandb, "swanlab": _finish_swanlab,
    "trackio": _finish_trackio, "mlflow": _finish_mlflow,
}  # fmt: skip

# --- values ---


def ends_apart(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, of an interval its two ends: trackers draw single values."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list | tuple) and key.endswith("_ci") and len(value) == 2:
            found |= {f"{key}_low": value[0], f"{key}_high": value[1]}
        elif is_number(value) and math.isfinite(value):
            found[key] = value
    return found


def ends_apart_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same in a mapping's mappings."""
    return {key: ends_apart(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
