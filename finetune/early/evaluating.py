"""`ft eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from finetune.early.inputs import adapter_and_base, base, check_not_read, reward_model, rows, there, together
from finetune.evaluation import options
from finetune.metrics import asked
from finetune.models import sources
from finetune.recipe.file import load
from finetune.recipe.resolve import absolute_data
from finetune.recipe.sections import ModelConfig, held_sets
from finetune.run.directory import read_recipe, section_of


def evaluated(
    runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None, data: str | Sequence[str] | None,
    reward: str | None, json_file: str | None, quantization: str | None, predictions: str | None,
    named: Sequence[str] | None = None, thinking: str | None = None, shots_from: str | None = None,
    tasks: str | None = None,
) -> None:  # fmt: skip
    """UserError for options of `ft eval` that cannot be, and for runs, recipes, models, adapters and data that are not
    there."""
    checks: list[Callable[[], object]] = [
        lambda: options.check(runs, recipe, model, adapter, data, json_file, quantization, predictions, named, thinking)
    ]
    own = data is None and tasks is None
    if recipe is not None:
        loaded = load(recipe, None)
        if not (Path(loaded.output.dir) / "result.json").exists() and model is None:
            checks.append(lambda: base(loaded.model))
        if named is None:
            checks.append(lambda: asked.check(loaded.eval.metrics or (), "eval.metrics"))
        if own:
            checks.append(lambda: rows(loaded.eval.paths, "eval.data", held_out=True))
            checks.append(lambda: some(loaded.eval.data is not None or loaded.data.eval_split is not None))
    for name in (*runs, *([adapter] if adapter is not None else ())):
        checks.append(lambda name=name: evaluated_one(name, model, name == adapter, own))  # type: ignore[misc]
    given = [*runs, *filter(None, (adapter, model))]
    if own and recipe is None and given:
        checks.append(lambda: some(any(map(may_have_rows, given))))
    if model is not None and not runs and adapter is None:
        checks.append(lambda: there(ModelConfig(name=model)))
    if data is not None:
        checks.append(lambda: held_out_files(data))
        for key, written in (("--predictions", predictions), ("--json", json_file)):
            if written not in (None, "-"):
                checks.append(lambda key=key, written=written: not_among(data, written, key))  # type: ignore[misc]
    if tasks is not None:
        checks.append(lambda: options.tasks(tasks))
    if shots_from is not None:
        checks.append(lambda: rows(absolute_data(shots_from), "--shots-from"))
    if reward is not None:
        checks.append(lambda: reward_model(reward, "--reward"))
    together(*checks)


def some(there: bool) -> None:
    if not there:
        raise options.no_rows()


def may_have_rows(name: str) -> bool:
    """Whether what is called so may name held-out rows: a run, or what one was merged to. What is not there may, too:
    that is another problem."""
    path = Path(name).expanduser()
    there = path.exists() or name in sources.known_names()
    return not there or (path / "recipe.yaml").is_file() or (path / "merge.json").is_file()


def held_out_files(data: str | Sequence[str]) -> None:
    """UserError for sets of --data that are not there."""
    rows([absolute_data(one.path) for one in options.named_sets(data)], "--data", held_out=True)


def not_among(data: str | Sequence[str], written: str, key: str) -> None:
    """UserError where what is written is, or would be, among the sets of --data."""
    for one in options.named_sets(data):
        check_not_read(Path(written).expanduser(), one.path, key)


def evaluated_one(name: str, model: str | None, is_adapter: bool, own: bool) -> None:
    """A run, with its base and, where it is measured on its own rows, its data; an adapter, or a model."""
    said = section_of(read_recipe(Path(name)), "eval").get("data")
    if own and said is not None:
        rows([one.path for one in held_sets(said)], "eval.data", held_out=True)
    if is_adapter or sources.what_is(name) == "adapter":
        adapter_and_base(name, model)
    elif not (Path(name).expanduser() / "model").is_dir():
        there(ModelConfig(name=name))
