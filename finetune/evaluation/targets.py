"""What `ft eval` is given: runs, adapters and models, with the settings that their runs would use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models import adapter_files, attach, sources
from finetune.models.identity import configs_of
from finetune.models.sources import builtin_names
from finetune.places import read_json
from finetune.recipe.file import check, load
from finetune.recipe.resolve import absolute_eval
from finetune.recipe.sections import DataConfig, EvalConfig, ModelConfig
from finetune.recipe.stages import REFERENCE_FREE, Recipe
from finetune.run.directory import read_recipe
from finetune.run.resuming import changed_keys
from finetune.terminal.progress import note


@dataclass(frozen=True)
class Target:
    """One model to evaluate, with the settings its run would use."""

    name: str
    model: ModelConfig
    adapter: Path | None
    data: DataConfig
    eval: EvalConfig
    base: ModelConfig | None = None
    """What a run started from."""
    template: Path | None = None
    """The adapter whose locked chat template is used, where the adapter itself is not."""
    recipe: Any = None
    """Of its run, or the one that has no run yet."""
    trained: bool = True
    """Not a base."""
    scores: str | None = None
    """Where the reward model lies, for one that scores answers and writes none."""

    @property
    def treatment(self) -> str | None:
        """data.thinking of its run; None where only the weights can say it."""
        return None if self.data.train == "-" else self.data.thinking


def find_targets(
    runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None, compare_base: bool = False
) -> list[Target]:
    """What the arguments name. UserError when they name nothing. `model` is the base of runs and adapters."""
    if recipe is not None:
        loaded = load(recipe, None)
        if (Path(loaded.output.dir) / "result.json").exists():
            return [as_recipe_says(run_target(loaded.output.dir, model, compare_base), loaded)]
        config = loaded.model if model is None else loaded.model.at(model)
        return [Target("base", config, None, loaded.data, loaded.eval, recipe=loaded, trained=False)]
    if runs:
        return called_apart([plain_target(path, model, compare_base) for path in runs], runs)
    if adapter is not None:
        return [run_target(adapter, model, compare_base)]
    if model is not None:
        return [model_target(model)]
    raise UserError("nothing to evaluate", fix="give a run directory, --recipe, or --model")


def called_apart(found: list[Target], references: Sequence[str]) -> list[Target]:
    """Those of one name (runs/a/best, runs/b/best) by what was given. UserError for one that is given twice."""
    if twice := next((one for one in references if references.count(one) > 1), None):
        raise UserError("is given twice", path=twice, fix="name it once")
    names = [target.name for target in found]
    return [
        replace(target, name=reference) if names.count(target.name) > 1 else target
        for target, reference in zip(found, references, strict=True)
    ]


def as_recipe_says(target: Target, recipe: Recipe) -> Target:
    """The run of a recipe that was edited since: what it now says about evaluation holds, and is told."""
    said = {key: getattr(recipe.eval, key) for key in recipe.eval.model_fields_set}
    now = target.eval.model_copy(update=said)
    before, after = absolute_eval(target.eval).model_dump(), absolute_eval(now).model_dump()
    for key in dict.fromkeys(key.partition(".")[0] for key in changed_keys(before, after)):
        note(f"eval.{key} {after[key]}, as the recipe says now; the run had {before[key]}")
    return replace(target, eval=now, data=recipe.data)


def plain_target(reference: str, model: str | None = None, compare_base: bool = False) -> Target:
    """A run directory, an adapter's folder, a model's folder or a built-in base."""
    place = Path(reference).expanduser()
    is_adapter = any((folder / "adapter_config.json").is_file() for folder in (place, place / "adapter"))
    is_model = any((folder / "config.json").is_file() for folder in (place, place / "model"))
    if is_adapter or (place / "recipe.yaml").is_file() or not (is_model or reference in builtin_names()):
        return run_target(reference, model, compare_base)
    if model is not None and not compare_base:
        what = f"has no effect: {reference} is a model itself"
        raise UserError(what, key="--model", fix="leave it out, or add --compare-base")
    target = model_target(reference)
    return target if model is None else replace(target, base=ModelConfig(name=model))


def model_target(reference: str) -> Target:
    """A model by itself; a merged one with the settings of the run that it was made of, where that is still there."""
    path = Path(reference).expanduser()
    name = path.name or path.resolve().name
    alone = Target(name, ModelConfig(name=reference), None, DataConfig(train="-"), EvalConfig(), trained=False)
    folder = read_json(path / "merge.json").get("adapter")
    if not isinstance(folder, str) or not (Path(folder) / "adapter_config.json").is_file():
        return alone
    try:
        values = read_recipe(Path(folder).parent)
        if values is None:
            return alone
        recipe: Any = check(values, None, Path(folder).parent / "recipe.yaml")
    except UserError:
        return alone
    base = base_model(recipe, Path(folder).parent, None)
    return replace(
        alone, data=recipe.data, eval=recipe.eval, base=base, template=Path(folder), recipe=recipe, trained=True
    )


def base_model(recipe: Any, path: Path, model: str | None) -> ModelConfig:
    """What the run in `path` was trained on, without any adapter."""
    base: ModelConfig = recipe.model.model_copy(update={"adapter": None})
    if model is None and (path / "start").is_dir():  # dpo.start: merge made a base of its own
        model = str(path / "start")
    return base if model is None else base.at(model)


def run_target(reference: str, model: str | None = None, compare_base: bool = False) -> Target:
    """A run directory, or an adapter folder made by any PEFT tool."""
    path = Path(reference).expanduser()
    name = path.name or path.resolve().name
    sources.check_usable(path)
    values = read_recipe(path)
    if values is None:
        folder = sources.adapter_folder(reference)
        config = configs_of(folder, model)[1]
        attach.check_adapter(folder, config)
        scores = str(folder) if adapter_files.described(folder).get("task_type") == "SEQ_CLS" else None
        return Target(name, config, folder, DataConfig(train="-"), EvalConfig(), config, scores=scores)
    recipe: Any = check(values, None, path / "recipe.yaml")
    base = base_model(recipe, path, model)
    if recipe.stage == "reward":
        return Target(name, base, None, recipe.data, recipe.eval, recipe=recipe, scores=str(path))
    if recipe.adapter.method == "full":
        if model is not None and not compare_base:
            what = "is a full fine-tuning, for which the base is only needed to compare with"
            raise UserError(what, path=path, key="--model", fix="leave it out, or add --compare-base")
        # What the saved config.json holds already, and what was locked when it was saved.
        tuned = base.at(str(path / "model"), rope_scaling=None, chat_template=None, quantization=None)
        start = None if recipe.model.is_new else base  # random weights, which no folder holds
        return Target(name, tuned, None, recipe.data, recipe.eval, start, path / "model", recipe)
    folder = sources.adapter_folder(reference)
    check_there(base, path)
    attach.check_adapter(folder, base)
    return Target(name, base, folder, recipe.data, recipe.eval, base, folder, recipe)


def check_there(base: ModelConfig, run: Any) -> None:
    """UserError when the base of a run is gone from where it was."""
    if Path(base.name).is_absolute() and not Path(base.name).exists():
        what = f"was trained on {base.name}, which is no longer there"
        raise UserError(what, path=run, key="--model", fix="give the base's place now")


def bases_of(targets: Sequence[Target], key: str = "--compare-base") -> list[Target]:
    """The bases of runs and adapters, each once, asked with the chat template that was trained. UserError without."""
    found = {(t.base.name, t.base.quantization): t for t in targets if t.base is not None}
    if not found:
        fix = "give a run that started from a model, or --adapter"
        raise UserError(f"{targets[0].name} has no base to compare with", key=key, fix=fix)
    names = [f"base {Path(name).name}" for name, _ in found] if len(found) > 1 else ["base"]
    made = []
    for name, target in zip(names, found.values(), strict=True):
        base = target.base
        assert base is not None
        check_there(base, target.name)
        made.append(replace(target, name=name, model=base, adapter=None, base=None, recipe=None, trained=False))
    return made


def quantized(target: Target, kind: str) -> Target:
    model = target.model.model_copy(update={"quantization": None if kind == "none" else kind})
    return replace(target, name=f"{target.name} {kind}", model=model)


def reference_of(target: Target) -> Target | None:
    """What a run of dpo or kto was kept near: the base without adapter, or the adapter that it went on from.

    None where the objective has none, and for a LoftQ start, which is stored nowhere.
    """
    recipe = target.recipe
    if recipe is None or recipe.stage not in ("dpo", "kto") or target.base is None:
        return None
    section = getattr(recipe, recipe.stage)
    if getattr(section, "loss_type", "") in REFERENCE_FREE:
        return None
    model = target.base if target.adapter is None else target.model
    if recipe.model.adapter is None or section.start == "merge":
        loftq = getattr(recipe.adapter, "init_lora_weights", None) == "loftq"
        return None if loftq else replace(target, model=model, adapter=None)
    if not Path(recipe.model.adapter).exists():
        note(f"{target.name}: {recipe.model.adapter}, from which it started, is gone: no reward to measure")
        return None
    return replace(target, model=model, adapter=sources.adapter_folder(recipe.model.adapter))
