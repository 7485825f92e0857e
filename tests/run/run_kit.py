"""Runs to write over, for the tests of the run directory."""

from __future__ import annotations

from pathlib import Path

from finetune.recipe.file import check
from finetune.recipe.stages import SftRecipe
from finetune.run.opening import open_run


def recipe(folder: Path, **train: object) -> SftRecipe:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "m"}, "data": {"train": "d"}, "train": train,
        "output": {"dir": str(folder)},
    }  # fmt: skip
    built = check(values, "sft")
    assert isinstance(built, SftRecipe)
    return built


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finished(folder: Path, **files: str) -> None:
    """A run of ours, with files `folder__name`."""
    with open_run(recipe(folder)) as run:
        for name, text in files.items():
            path = run.path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        run.finish({"stage": "sft"})
