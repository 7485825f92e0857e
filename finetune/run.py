"""The run directory: what a training run leaves behind.

    recipe.yaml  adapter/ | model/  metrics.jsonl  result.json  report.html  loss.png  checkpoints/

`open_run` refuses a directory that already holds results; result.json is written last and atomically, so a directory
without it is unfinished. A lock keeps two processes out of one directory.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from finetune.errors import Problem, UserError
from finetune.recipe import Recipe
from finetune.recipe_file import to_yaml

# Everything a run writes; --overwrite removes these and nothing else.
CONTENTS = (
    "recipe.yaml", "adapter", "model", "metrics.jsonl", "result.json", "report.html", "loss.png", "checkpoints",
    "samples.jsonl", "reward.yaml", "reward", "start",
)  # fmt: skip
CHECKPOINT_COMPLETE = "complete"  # written last into a checkpoint: without it the checkpoint is half-written


@dataclass(frozen=True)
class Run:
    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Replies of PPO's rollouts."""
        return self.path / "samples.jsonl"

    @property
    def reward(self) -> Path:
        """The reward model that `ft ppo` trains first."""
        return self.path / "reward"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / CHECKPOINT_COMPLETE).exists()]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_lines(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics)

    def forget_after(self, step: int) -> None:
        """Drop the metrics and samples of steps that a resumed run will take again."""
        for path in (self.metrics, self.samples):
            if path.exists():
                rows = [row for row in read_lines(path) if row["step"] <= step]
                write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.result, {**result, "versions": versions()})


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "tokenizers")
    return {
        "ft": metadata.version("ft-recipes"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


def check_output(directory: str | Path, overwrite: bool, resume: bool) -> None:
    """UserError if results would be lost. Writes nothing."""
    run = Run(Path(directory))
    if run.path.exists() and not run.path.is_dir():
        raise UserError("is a file", path=run.path, key="output.dir", fix="choose another directory with --output DIR")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", fix="give one of them")
    if resume:
        if run.result.exists():
            raise UserError("this run is finished, there is nothing to resume", path=run.path, fix="use --overwrite")
        if run.last_checkpoint() is None and not run.reward.is_dir():
            raise UserError("holds no complete checkpoint", path=run.checkpoints, fix="start it again with --overwrite")
    elif not overwrite and run.result.exists():
        raise UserError(
            "already holds the results of a run", path=run.path, key="output.dir", fix="use --output DIR or --overwrite"
        )
    elif not overwrite and run.path.exists() and any(run.path.iterdir()):
        resumable = "--resume to go on, or " if run.last_checkpoint() or run.reward.is_dir() else ""
        raise UserError(
            "already holds files", path=run.path, key="output.dir",
            fix=f"use {resumable}--overwrite to start again, or --output DIR",
        )  # fmt: skip


def check_inputs(recipe: Recipe) -> None:
    """UserError when something that the run reads is what --overwrite would delete first."""
    directory = Path(recipe.output.dir).resolve()
    deleted = [directory / name for name in CONTENTS]
    problems = [
        Problem("would be deleted by --overwrite", path=text, key=key, fix="use --output DIR, or move it away")
        for key, text in strings(recipe.model_dump())
        if os.path.exists(text) and any(Path(text).resolve().is_relative_to(path) for path in deleted)
    ]
    if problems:
        raise UserError(problems)


def strings(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from strings(value, key)


def check_resumable(recipe: Recipe) -> None:
    """UserError naming the keys in which `recipe` differs from the one that the unfinished run was started with."""
    path = Path(recipe.output.dir) / "recipe.yaml"
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = changed_keys(old, yaml.safe_load(to_yaml(recipe)))
    if keys:
        raise UserError(
            [
                Problem("differs from the run to resume", path, key=key, fix="undo the change or use --output DIR")
                for key in keys
            ]
        )


@contextmanager
def open_run(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Iterator[Run]:
    """Create the directory, lock it, write recipe.yaml. Call after everything that can be checked has been checked."""
    run = Run(Path(recipe.output.dir))
    check_output(run.path, overwrite, resume)
    if overwrite:
        check_inputs(recipe)
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.path / ".lock", blocking=False).acquire()
    except Timeout:
        raise UserError("another process is writing here", path=run.path, fix="wait, or use --output DIR") from None
    with lock:
        if overwrite:
            for name in CONTENTS:
                target = run.path / name
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        if not resume:
            write_atomically(run.path / "recipe.yaml", to_yaml(recipe, f"# ft {recipe.stage} --recipe recipe.yaml\n"))
        yield run
    (run.path / ".lock").unlink(missing_ok=True)


def read_recipe(run_path: Path) -> dict[str, Any] | None:
    """The resolved recipe of a run directory, or None if it is not one."""
    path = run_path / "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
