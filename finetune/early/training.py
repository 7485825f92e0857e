"""`ft pretrain`, `sft`, `dpo`, `kto`, `reward`, `ppo`, and the data that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import yaml

from finetune import python_files, ranks
from finetune.early import tracking
from finetune.early.inputs import ENDLESS, announce, base, file, reward_model, rows, together
from finetune.errors import UserError
from finetune.metrics import asked
from finetune.models import sources
from finetune.recipe.extending import base_of
from finetune.recipe.file import load
from finetune.recipe.reading import find, recipe_text
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import as_list
from finetune.recipe.stages import RECIPES, ROWS, Recipe
from finetune.run.directory import Run
from finetune.run.guards import check_inputs, check_output
from finetune.run.resuming import check_resumable, goes_further
from finetune.terminal.progress import note, warn

# What `resolve` fills in from the machine.
MACHINE = {
    "model.dtype", "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
    "train.per_device_eval_batch_size", "train.gradient_checkpointing",
}  # fmt: skip


def recipe(
    reference: str, stage: str, overrides: Sequence[str], output: str | None, resume: bool, overwrite: bool,
    dry_run: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe of a training command. UserError for everything that is wrong with it but needs no tokenizer.

    With `dry_run` an output directory that holds something already is told, not refused.
    """
    found: Recipe = load(reference, RECIPES[stage], overrides, output, note)

    def place() -> None:
        if resume and not Run.of(found).path.exists():
            fix = sources.did_you_mean(found.output.dir, "leave --resume out to start it")
            raise UserError("no such run to resume", path=found.output.dir, key="output.dir", fix=fix)
        further = resume and goes_further(found)
        check_output(found.output.dir, overwrite, resume, warn if dry_run else None, further)
        if resume:
            ours = MACHINE | ({"adapter"} if found.model.adapter is not None else set())
            check_resumable(resolve(found, Hardware()), ours)

    read = [path for path in (find(reference), base_of(find(reference))) if path is not None]
    kept = [lambda path=path: check_inputs(found, path) for path in read] if overwrite else []
    together(*kept, place, *checks_of(found))
    if ENDLESS not in as_list(found.data.train) and ranks.local_rank() == 0:
        from finetune.data.audit import screen

        screen(found.data, ROWS[stage])
    announce(found.model)
    return found


def inputs(recipe: Recipe) -> None:
    """UserError for what a recipe names and is not there."""
    together(*checks_of(recipe))
    announce(recipe.model)


def checks_of(recipe: Recipe) -> list[Callable[[], object]]:
    model, reward = recipe.model, getattr(recipe, "reward", None)
    checks: list[Callable[[], object]] = [
        lambda: rows(recipe.data.train, "data.train"),
        lambda: rows(recipe.eval.paths, "eval.data", held_out=True),
        lambda: tracking.check(recipe.train.report_to),
        lambda: asked.check(recipe.eval.metrics or (), "eval.metrics"),
        lambda: asked.check(getattr(recipe.eval.during, "metrics", None) or (), "eval.during.metrics"),
        lambda: rows(recipe.eval.shots_from, "eval.shots_from"),
        lambda: rows(getattr(reward, "train", None), "reward.train"),
        lambda: file(model.chat_template, "model.chat_template", "give a Jinja file"),
    ]
    if model.adapter is not None:
        checks.append(lambda: sources.adapter_folder(str(model.adapter), "model.adapter"))
    for rule in getattr(reward, "functions", None) or ():
        checks.append(lambda rule=rule: python_files.parts_of(rule, "reward.functions", "rule"))  # type: ignore[misc]
    if getattr(reward, "model", None) is not None:
        checks.append(lambda: reward_model(str(reward.model)))  # type: ignore[union-attr]
    checks.append(lambda: base(model))
    return checks


def data_of(section: Any, model: Any, held_out: Any) -> None:
    """For `ft data`: UserError for files, or a tokenizer's model, that are not there."""
    checks = [lambda: rows(section.train, "data.train"), lambda: rows(held_out, "eval.data", held_out=True)]
    together(*checks, *([] if model is None else [lambda: base(model)]))


def gpu_missing(reference: str, recipe: Recipe) -> str | None:
    """A warning where the recipe's first line asks for a GPU, for the model that it names, and there is none."""
    text = recipe_text(find(reference))
    first = next(iter(text.splitlines()), "")
    _, _, needs = first.lstrip("# ").partition("  ")
    named = (yaml.safe_load(text).get("model") or {}).get("name")
    if not first.startswith("#") or "GPU" not in needs or "no GPU" in needs or named != recipe.model.name:
        return None
    from finetune.models.hardware import detect

    if detect().device != "cpu":
        return None
    small = "--set model.name=tiny-llama tries the recipe on a built-in base"
    return f"this recipe asks for {needs.strip()}, and no GPU was found here: it may not fit, or take days; {small}"
