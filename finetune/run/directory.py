"""The run directory: what a training run leaves behind.

    recipe.yaml  adapter/ | model/  metrics.jsonl  result.json  report.html  loss.png  checkpoints/
    data_audit.json  evaluation.json (of the last `ft eval`)  error.json (of a run that failed)

result.json is written last and atomically, so a directory without it is unfinished.
"""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import places, ranks
from finetune.errors import Problem, UserError
from finetune.recipe.reading import read
from finetune.recipe.stages import Recipe
from finetune.run.checkpoints import CHECKPOINT_COMPLETE, checkpoints_of, damage, known_of
from finetune.run.writing import append_lines, as_line, read_lines, write_atomically, write_json
from finetune.terminal.progress import warn

# Everything a run writes; --overwrite removes these and nothing else.
CONTENTS = (
    "recipe.yaml", "adapter", "model", "metrics.jsonl", "result.json", "report.html", "loss.png", "checkpoints",
    "samples.jsonl", "reward.yaml", "reward", "start", "start.part", "data_audit.json", "evaluation.json", "error.json",
    "tensorboard", "adapter.part", "model.part", "adapter.failed", "model.failed", "adapter.failed.part",
    "model.failed.part", "failed_batch.jsonl",
)  # fmt: skip
MARK = "# Written by ft: the recipe of the run in this folder, which --overwrite replaces."
LOCK = ".lock"
FAILED = ".failed"  # ends the name of weights that a check at the end of the run has found wanting
ASIDE = ".replaced"  # what --overwrite replaces, until the new run is finished


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.adapter, self.model, self.checkpoints = path / "adapter", path / "model", path / "checkpoints"
        self.metrics, self.result = path / "metrics.jsonl", path / "result.json"
        self.samples = path / "samples.jsonl"  # replies of PPO's rollouts, answers of eval.during
        self.data_audit = path / "data_audit.json"  # what was trained on: lengths, languages, problems, a few rows
        self.evaluation = path / "evaluation.json"  # what `ft eval` last found
        self.error = path / "error.json"  # why an unfinished run failed
        self.reward = path / "reward"  # the reward model that `ft ppo` trains first
        self.start: Path | None = None
        """The checkpoint that it goes on from, set when it is opened."""

    @classmethod
    def of(cls, recipe: Recipe) -> Run:
        return cls(Path(recipe.output.dir).expanduser())

    def keep_apart(self) -> None:
        """From now on weights go where nobody takes them for the result: a check has failed at the end."""
        self.adapter, self.model = self.path / f"adapter{FAILED}", self.path / f"model{FAILED}"

    def done(self) -> bool:
        """Whether it ended, and well."""
        result = places.read_json(self.result) if self.result.exists() else {}  # exists() says what may not be read
        return bool(result) and result.get("status") != "failed"

    def complete_checkpoints(self) -> list[Path]:
        """Newest first."""
        return [path for path in checkpoints_of(self.checkpoints) if (path / CHECKPOINT_COMPLETE).is_file()]

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(iter(self.complete_checkpoints()), None)

    def known(self) -> dict[str, Any]:
        """What the newest checkpoint says whose mark is as it was written: of a run all know the same inputs."""
        return next((known for path in self.complete_checkpoints() if (known := known_of(path))), {})

    def usable_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that can be read; what is wrong with newer ones is said. None without any.

        UserError when there are some and none can be read.
        """
        found = self.complete_checkpoints()
        reasons: list[str] = []
        for path in found:
            if (reason := damage(path)) is None:
                for broken, why in zip(found, reasons, strict=False):
                    warn(f"{broken} is damaged ({why}): going on from {path.name}")
                    (broken / CHECKPOINT_COMPLETE).unlink()  # from now on it is as if half-written
                return path
            reasons.append(reason)
        if found:
            fix, damaged = "start again with --overwrite", zip(found, reasons, strict=True)
            raise UserError([Problem(f"is damaged ({why})", path, fix=fix) for path, why in damaged])
        return None

    def append_metrics(self, row: dict[str, Any]) -> None:
        if ranks.first():
            append_lines(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics)

    def forget_after(self, step: int) -> None:
        """Drop the metrics and samples of steps that a resumed run will take again, and lines that a kill cut off."""
        if not ranks.first():
            return
        for path in (self.metrics, self.samples):
            if path.exists():
                rows = [row for row in read_lines(path) if row.get("step", 0) <= step]
                write_atomically(path, "".join(map(as_line, rows)))

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.result, {**result, "versions": versions()})


def not_usable(path: Path) -> tuple[str, str] | None:
    """(what, how to mend it) when a run of ours in `path` has no weights to be used; None for all other folders."""
    run = Run(path)
    if run.done() or not is_marked(path):
        return None
    if not run.result.exists():
        fix = "train it to its end first (--resume goes on from its last checkpoint)"
        return "is a run that is not finished: it has no result yet", fix
    if result := places.read_json(run.result):
        run.keep_apart()
        what = f"is a run of which a check failed at its end ({result.get('failed')})"
    else:
        what = "is a run whose result.json cannot be read"
    kept = next((str(folder) for folder in (run.adapter, run.model) if folder.is_dir()), None)
    return what, f"look at what it says; its weights are in {kept}" if kept else "train it again"


def is_marked(path: Path) -> bool:
    """Whether a run of ours wrote recipe.yaml in `path`."""
    recipe = path / "recipe.yaml"
    try:
        return recipe.is_file() and MARK in recipe.read_text(encoding="utf-8")
    except (OSError, ValueError):  # no UTF-8, or a path with a zero byte
        return False


def resumable(run: Run) -> bool:
    return run.last_checkpoint() is not None or run.reward.is_dir()


@cache
def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "tokenizers")
    ours = {"ft": metadata.version("ft-recipes"), "python": platform.python_version()}
    return {**ours, **{name: metadata.version(name) for name in names}}


def read_recipe(run_path: Path) -> dict[str, Any] | None:
    """The resolved recipe of a run directory, or None if it is not one. UserError where it cannot be read."""
    path = run_path / "recipe.yaml"
    return read(path)[0] if path.is_file() else None


def section_of(values: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """A section of a recipe that nothing has checked yet; {} where it is none."""
    found = (values or {}).get(name)
    return found if isinstance(found, dict) else {}
