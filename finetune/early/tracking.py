"""Whether the trackers of train.report_to are there, before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from finetune.errors import Problem, UserError

PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "swanlab": ("swanlab",),
    "trackio": ("trackio",), "mlflow": ("mlflow",),
}  # fmt: skip
"""tracker -> its packages, one of which will do; the first is what pip installs."""


def check(names: Sequence[str]) -> None:
    """UserError with the line that installs what is missing."""
    missing = [name for name in names if not any(find_spec(package) for package in PACKAGES[name])]
    if missing:
        line = f"pip install {' '.join(PACKAGES[name][0] for name in missing)}"
        problems = [Problem(f"{name} is not installed", key="train.report_to", fix=line) for name in missing]
        raise UserError(problems)
