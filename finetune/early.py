"""What is wrong with a command, found before torch is imported: a second instead of twenty.

What needs weights or a tokenizer is checked by the commands.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune import places
from finetune.adapters import consumers, weighted
from finetune.data import sources as data_sources
from finetune.errors import Problem, UserError
from finetune.evaluation import options
from finetune.metrics import asked
from finetune.models import pushing, sources
from finetune.models.export import FORMATS
from finetune.models.pushing import Push
from finetune.recipe.file import load
from finetune.recipe.reading import find, recipe_text
from finetune.recipe.resolve import Hardware, absolute_data, resolve
from finetune.recipe.sections import ModelConfig, as_list, held_sets
from finetune.recipe.stages import RECIPES, ROWS, Recipe
from finetune.run import appending
from finetune.run.directory import Run, read_recipe
from finetune.run.guards import check_inputs, check_output
from finetune.run.resuming import check_resumable
from finetune.serving import address
from finetune.terminal.progress import note, warn

ENDLESS = "builtin:world"
# What `resolve` fills in from the machine.
MACHINE = {
    "model.dtype", "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
    "train.per_device_eval_batch_size", "train.gradient_checkpointing",
}  # fmt: skip


def together(*checks: Callable[[], object]) -> None:
    """One UserError with the problems of all."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(list(dict.fromkeys(problems)))


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
        check_output(found.output.dir, overwrite, resume, warn if dry_run else None)
        if resume:
            ours = MACHINE | ({"adapter"} if found.model.adapter is not None else set())
            check_resumable(resolve(found, Hardware()), ours)

    together(lambda: check_inputs(found, find(reference)) if overwrite else None, place, *checks_of(found))
    if ENDLESS not in as_list(found.data.train):
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
        lambda: asked.check(recipe.eval.metrics or (), "eval.metrics"),
        lambda: asked.check(getattr(recipe.eval.during, "metrics", None) or (), "eval.during.metrics"),
        lambda: rows(recipe.eval.shots_from, "eval.shots_from"),
        lambda: rows(getattr(reward, "train", None), "reward.train"),
        lambda: file(model.chat_template, "model.chat_template", "give a Jinja file"),
    ]
    if model.adapter is not None:
        checks.append(lambda: sources.adapter_folder(str(model.adapter), "model.adapter"))
    for rule in getattr(reward, "functions", None) or ():
        path = rule.rpartition(":")[0]  # without a function it is refused when it is loaded
        checks.append(lambda path=path: file(path or None, "reward.functions", "give a Python file"))  # type: ignore[misc]
    if getattr(reward, "model", None) is not None:
        checks.append(lambda: reward_model(str(reward.model)))  # type: ignore[union-attr]
    checks.append(lambda: base(model))
    return checks


def base(model: Any) -> None:
    """UserError when the base, or the tokenizer of a new model, is not there."""
    if not model.is_new:
        sources.check(model)
        sources.check_there(model)
    elif model.tokenizer is not None and not model.tokenizer.startswith("builtin:"):
        sources.check_there(ModelConfig(name=model.tokenizer))


def announce(model: Any) -> None:
    """Say what will be downloaded; a new model has nothing to download."""
    if not model.is_new:
        sources.announce(model)


def reward_model(reference: str, key: str = "reward.model") -> None:
    """A reward model: a run of `ft reward`, or a model."""
    if (folder := sources.find_adapter(reference)) is not None:
        if places.read_json(folder / "adapter_config.json").get("task_type") != "SEQ_CLS":
            raise UserError("has no score head", path=reference, key=key, fix="give a run of `ft reward`")
        return
    if (Path(reference).expanduser() / "model").is_dir() or sources.what_is(reference) == "adapter":
        return
    if sources.file(ModelConfig(name=reference), "config.json") is None:
        raise UserError("has no config.json", path=reference, key=key, fix="give a complete model")


def file(path: str | None, key: str, fix: str) -> None:
    if path is not None and not Path(path).is_file():
        raise UserError("no such file", path=path, key=key, fix=fix)


def rows(data: Any, key: str, held_out: bool = False) -> None:
    """UserError for data that is not there; of hubs only the client can tell."""
    problems: list[Problem] = []
    for spec in [] if data is None else data_sources.as_dicts(data):
        try:
            if str(spec["path"]) == ENDLESS or spec.get("source") == "modelscope":
                continue
            data_sources.check_keys(spec)
            if not data_sources.is_hub(spec):
                spec = data_sources.held_out(spec) if held_out else spec
                data_sources.files_of(spec["path"], spec.get("split"))
        except UserError as error:
            problems += [Problem(**{**vars(p), "key": p.key or key}) for p in error.problems]
    if problems:
        raise UserError(problems)


def data_of(section: Any, model: Any, held_out: Any) -> None:
    """For `ft data`: UserError for files, or a tokenizer's model, that are not there."""
    checks = [lambda: rows(section.train, "data.train"), lambda: rows(held_out, "eval.data", held_out=True)]
    together(*checks, *([] if model is None else [lambda: base(model)]))


def adapter_and_base(reference: str, model: str | None) -> Path:
    """The folder of an adapter. UserError when it, or the base that it names or is given, is not there."""
    folder = sources.adapter_folder(reference)
    config = sources.base_config(folder, model)
    if model is None and Path(config.name).is_absolute() and not Path(config.name).exists():
        what = f"was trained on {config.name}, which is no longer there"
        raise UserError(what, path=reference, key="--model", fix="give the base's place now")
    there(config)
    return folder


def there(config: ModelConfig) -> None:
    """UserError for a model that is not; what will be downloaded is said."""
    sources.check_there(config)
    sources.announce(config)


def chat(
    listed: Sequence[str], model: str | None, adapters: Sequence[str], settings: dict[str, Any] | None = None,
    system: str | None = None, thinking: str | None = None, command: str = "ft chat",
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft chat` and `ft serve`. UserError when there is nothing to talk to."""
    options.check_thinking(thinking)
    if settings is not None:
        options.written(settings, 1, system, raw=False)
    runs, named = list(listed), named_adapters(adapters)
    if len(runs) == 1 and sources.what_is(runs[0]) == "model":
        if model is not None:
            raise UserError(f"given twice: {runs[0]} and --model {model}", fix="give one of them")
        if named:
            model, runs = runs[0], []  # ft chat MODEL --adapter A
    if not (runs or named or model is not None):
        raise UserError("no model to talk to", fix=f"write {command} RUN, or give --model or --adapter")
    if not runs and not named:
        there(ModelConfig(name=str(model)))
    together(*(lambda name=name: talker(name, model, name in named.values()) for name in (*runs, *named.values())))
    return runs, model, named


def served(
    listed: Sequence[str], model: str | None, adapters: Sequence[str], host: str, port: int, api_key: str | None,
    thinking: str | None = None, timeout: float = 600,
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft serve`. UserError for what cannot be served, or not there."""
    found: list[tuple[list[str], str | None, dict[str, str]]] = []
    together(
        server_extra,
        lambda: found.append(chat(listed, model, adapters, None, None, thinking, "ft serve")),
        lambda: address.check(host, port),
        lambda: check_key(api_key),
        lambda: check_seconds(timeout),
    )
    return found[0]


def server_extra() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(what, key="ft serve", fix="pip install 'ft-recipes[serve]'")


def check_seconds(timeout: float) -> None:
    if not 0 < timeout <= 1e6:  # nan, inf: no clock takes them
        raise UserError("must be seconds, at most a million", key="--timeout", fix="leave it out for ten minutes")


def check_key(api_key: str | None) -> None:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        what = "must be printable ASCII without spaces around it" if api_key else "is empty"
        raise UserError(what, key="--api-key", fix="give another one, or unset FT_API_KEY")


def talker(name: str, model: str | None, is_adapter: bool) -> None:
    """UserError for what is not there, and for a reward model."""
    if not is_adapter and sources.what_is(name) == "model":
        there(ModelConfig(name=name))
        return
    folder = adapter_and_base(name, model)
    if places.read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS":
        what = "is a reward model: it scores answers and gives none"
        raise UserError(what, path=name, fix="give a run of another stage; ft eval scores pairs with it")


def generated(
    runs: Sequence[str], model: str | None, adapters: Sequence[str], data: str, output: str, overwrite: bool,
    resume: bool, settings: dict[str, Any], n: int, system: str | None, raw: bool, thinking: str | None = None,
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft generate`. UserError for what is not there, or cannot be written."""
    listed = list(runs)
    if len(listed) == 1 and adapters and model is None and sources.find_adapter(listed[0]) is None:
        model, listed = listed[0], []  # ft generate MODEL --adapter A
    named = named_adapters(adapters)
    if not (listed or named or model is not None):
        raise UserError("no model to answer", fix="write ft generate RUN --data FILE --output FILE, or give --model")
    checks: list[Callable[[], object]] = [
        lambda: answers_file(output, data, overwrite, resume), lambda: options.written(settings, n, system, raw),
        lambda: options.check_thinking(thinking),
    ]  # fmt: skip
    if data != "-":
        checks.append(lambda: rows(absolute_data(data), "--data", held_out=True))
    for name in (*listed, *named.values()):
        checks.append(lambda name=name: evaluated_one(name, model, name in named.values(), False))  # type: ignore[misc]
    if model is not None and not listed and not named:
        checks.append(lambda: there(ModelConfig(name=model)))
    together(*checks)
    return listed, model, named


def named_adapters(adapters: Sequence[str]) -> dict[str, str]:
    """Name -> place. UserError for two of one name."""
    named = dict(map(named_adapter, adapters))
    if len(named) < len(adapters):
        raise UserError("two adapters have one name", key="--adapter", fix="name them: --adapter NAME=PATH")
    return named


def named_adapter(text: str) -> tuple[str, str]:
    """(name, place) of NAME=PLACE, or of a place alone, which is called as its folder is."""
    name, equals, place = text.partition("=")
    if equals and name and place and not Path(text).expanduser().exists():
        return name, place
    path = Path(text).expanduser()
    return path.name or path.resolve().name, text


def answers_file(output: str, data: str, overwrite: bool, resume: bool) -> None:
    """UserError when answers cannot be written there, or would be read again."""
    if output == "-":
        if resume or overwrite:
            key = "--resume" if resume else "--overwrite"
            raise UserError("has no effect on stdout", key=key, fix="leave it out, or name a file")
        return
    path, source = Path(output).expanduser(), Path(data).expanduser()
    if data != "-" and source.exists():
        read, full = source.resolve(), path.resolve()
        if read == full or read in full.parents:
            what = "is what is read" if read == full else f"lies in the folder that is read ({data})"
            raise UserError(what, path=output, key="--output", fix="name another file")
    appending.check(path, overwrite, resume)


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
    for name in (*runs, *([adapter] if adapter is not None else ())):
        checks.append(lambda name=name: evaluated_one(name, model, name == adapter, own))  # type: ignore[misc]
    if model is not None and not runs and adapter is None:
        checks.append(lambda: there(ModelConfig(name=model)))
    if data is not None:
        checks.append(lambda: held_out_files(data))
    if tasks is not None:
        checks.append(lambda: options.tasks(tasks))
    if shots_from is not None:
        checks.append(lambda: rows(absolute_data(shots_from), "--shots-from"))
    if reward is not None:
        checks.append(lambda: reward_model(reward, "--reward"))
    together(*checks)


def held_out_files(data: str | Sequence[str]) -> None:
    """UserError for sets of --data that are not there."""
    rows([absolute_data(one.path) for one in options.named_sets(data)], "--data", held_out=True)


def evaluated_one(name: str, model: str | None, is_adapter: bool, own: bool) -> None:
    """A run, with its base and, where it is measured on its own rows, its data; an adapter, or a model."""
    try:
        values = read_recipe(Path(name)) or {}
    except (yaml.YAMLError, UnicodeError):
        values = {}
    said = (values.get("eval") or {}).get("data") if isinstance(values, dict) else None
    if own and said is not None:
        rows([one.path for one in held_sets(said)], "eval.data", held_out=True)
    if is_adapter or sources.what_is(name) == "adapter":
        adapter_and_base(name, model)
    elif not (Path(name).expanduser() / "model").is_dir():
        there(ModelConfig(name=name))


def merged(
    adapters: Sequence[str], target: Path, model: str | None, dtype: str | None, layout: str, overwrite: bool,
    size: str = "5GB", kind: str | None = None, density: float | None = None, seed: int | None = None,
    svd_rank: int | None = None, push: Push | None = None,
) -> None:  # fmt: skip
    """UserError for what is wrong with the arguments of `ft merge`."""

    def these() -> None:
        parts = weighted.parts_of(adapters)
        if (how := weighted.combination(parts, kind, density, seed, svd_rank)) is not None:
            weighted.check(parts, how)
        for part in parts:
            check_apart(target, adapter_and_base(str(part.folder), model))

    together(
        lambda: check_target(target, overwrite), lambda: check_options(dtype, layout), lambda: check_size(size), these,
        *([] if push is None else [lambda: pushing.check(push)]),
    )  # fmt: skip


def exported(adapter: str, consumer: str, target: Path, model: str | None, overwrite: bool) -> None:
    """UserError for what is wrong with the arguments of `ft export`, and for limits that an adapter's config meets."""

    def these() -> None:
        folder = adapter_and_base(adapter, model)
        check_apart(target, folder, done="exported")
        consumers.check(consumer, places.read_json(folder / "adapter_config.json"), folder, started_by(folder))

    together(lambda: check_target(target, overwrite, EXPORT), lambda: consumers.consumer(consumer), these)


def started_by(adapter: Path) -> str | None:
    """init_lora_weights of the run that an adapter is of."""
    found = read_recipe(adapter.parent) if adapter.name == "adapter" else None
    section = found.get("adapter") if isinstance(found, dict) else None
    return section.get("init_lora_weights") if isinstance(section, dict) else None


def gguf(adapter: str | None, model: str | None, target: Path, kind: str | None, overwrite: bool) -> None:
    """UserError for what is wrong with the arguments of `ft merge --format gguf`."""
    from finetune.models.gguf.places import check_type, check_unwritten

    def base_there() -> None:
        if adapter is not None:
            adapter_and_base(adapter, model)
        else:
            there(ModelConfig(name=str(model)))

    together(lambda: check_unwritten(target, overwrite), lambda: check_type(kind), base_there)


DTYPES = ("float32", "bfloat16", "float16")
REPORT, EXPORT = "merge.json", "export.json"


def check_options(dtype: str | None, layout: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", key="--dtype", fix=f"one of {', '.join(DTYPES)}")
    if layout not in FORMATS:
        raise UserError(f"unknown format {layout!r}", key="--format", fix=f"one of {', '.join(FORMATS)}")


SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB|TB)", re.IGNORECASE)


def check_size(text: str) -> None:
    """UserError for a size of shards that is none, or nothing."""
    if not SIZE.fullmatch(text.strip()) or not float(text.strip()[:-2]):
        raise UserError(f"{text!r} is no size", key="--max-shard-size", fix="write 5GB, 500MB")


def check_target(target: Path, overwrite: bool, report: str = REPORT) -> None:
    """UserError when something that no merge (or export) wrote stands at `target`, or one without `overwrite`."""
    places.check_folder(target, "--output", here=False)
    places.check_part(target, "--output")
    if not target.exists() or not any(target.iterdir()):
        return
    made = places.read_json(target / report)
    ours = "adapter" in made and places.made_by_ft(made)
    if not (ours and overwrite):
        fix = "choose another folder" + (", or --overwrite" if ours else "")
        raise UserError("already holds files", path=target, key="--output", fix=fix)


def written_names(target: Path, overwrite: bool, report: str = REPORT) -> Collection[str]:
    """What the merge, or the export, at `target` wrote."""
    check_target(target, overwrite, report)
    files = places.read_json(target / report).get("files")
    if isinstance(files, list):
        return files
    kinds = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")  # before it was noted
    return [path.name for path in target.iterdir() if path.suffix in kinds]


def check_apart(target: Path, *inputs: Path, done: str = "merged") -> None:
    """UserError when `target` is or holds something that is read."""
    full = target.resolve()
    for path in (path.resolve() for path in inputs):
        if full == path or full in path.parents:
            what = f"is what is {done}, or holds it ({path})"
            raise UserError(what, path=target, key="--output", fix="choose a folder of its own")


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
