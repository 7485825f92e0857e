"""`ft eval`: held-out metrics of runs, recipes or models, with the base beside them on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from finetune.data import dataset
from finetune.data.audit import Audit, conversations
from finetune.data.chat import make_encoder
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.evaluation import Evaluation, evaluate, split_reference
from finetune.families import family
from finetune.metrics import by_group, mean, paired, wilson
from finetune.models import hardware, loading
from finetune.models.quantization import weight_bytes
from finetune.progress import note
from finetune.recipe import DataConfig, EvalConfig, ModelConfig, absolute, compute_dtype
from finetune.recipe_file import check, load
from finetune.run import read_recipe, write_json
from finetune.scoring import RewardModel, is_reward_run


@dataclass(frozen=True)
class Target:
    """One model to evaluate, with the settings its run would use."""

    name: str
    model: ModelConfig
    adapter: Path | None
    data: DataConfig
    eval: EvalConfig


def run(
    runs: Sequence[str],
    recipe: str | None,
    model: str | None,
    adapter: str | None,
    data: str | None,
    compare_base: bool,
    limit: int | None,
    json_file: str | None,
    quantization: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    reward: str | None = None,
) -> None:
    if runs and all(is_reward_run(path) for path in runs):
        results = [evaluate_reward(path, data, limit) for path in runs]
        comparisons = [compare(results[0], other, "preference_accuracy") for other in results[1:]]
        report(data or "eval.data", results, comparisons, json_file)
        return
    kinds = quantizations(quantization)
    targets = find_targets(runs, recipe, model, adapter)
    held_out = data or targets[0].eval.data
    if held_out is None:
        raise UserError("no held-out data", key="eval.data", fix="set it in the recipe, or give --data FILE")
    if compare_base:
        bases = {t.model.name: t for t in targets if t.adapter is not None or t.name != t.model.name}
        targets = [Target("base", t.model, None, t.data, t.eval) for t in bases.values()] + targets
    rows = dataset.load_eval_rows(absolute(held_out), targets[0].data)[: limit or targets[0].eval.limit]
    rows = with_few_groups(rows)
    variants = [[quantized(target, kind) for kind in kinds] for target in targets] if kinds else [targets]
    evaluated = [[evaluate_target(target, rows, temperature, seed) for target in part] for part in variants]
    results = [result for part in evaluated for result in part]
    if reward is not None:
        judge(reward, results, rows)
    # With quantizations each model is compared with its first kind, otherwise every model with the first one.
    metrics = ["exact_match", *(f"exact_match/{group}" for group in results[0].metrics.get("groups", ()))]
    metrics += ["loss"] if kinds else []
    comparisons = [compare(part[0], other, m) for part in evaluated for other in part[1:] for m in metrics]
    if reward is not None:
        comparisons += [compare(part[0], other, "reward") for part in evaluated for other in part[1:]]
    report(held_out, results, comparisons, json_file, {"temperature": temperature, "seed": seed} if temperature else {})


def report(
    held_out: str, results: list[Evaluation], comparisons: list[dict[str, Any]], json_file: str | None,
    sampled: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """As a table on stdout, as JSON there, or both."""
    sampled = sampled or {}
    output = {
        "data": held_out,
        **sampled,
        "runs": [{"name": r.name, "n": r.n, "metrics": r.metrics} for r in results],
        "comparisons": comparisons,
    }
    if json_file == "-":
        print(json.dumps(output, ensure_ascii=False, indent=2))
    else:
        show(results, comparisons, "".join(f", {name} {value}" for name, value in sampled.items()))
    if json_file and json_file != "-":
        write_json(Path(json_file), output)
        note(f"written to {json_file}")


def evaluate_reward(path: str, data: str | None, limit: int | None) -> Evaluation:
    """How often a reward model scores the chosen answer higher, for all pairs and each group of them."""
    recipe = check(read_recipe(Path(path)) or {}, "reward", Path(path) / "recipe.yaml")
    held_out = data or recipe.eval.data
    if held_out is None:
        raise UserError("no held-out pairs", key="eval.data", fix="set it in the recipe, or give --data FILE")
    audit = Audit(DataConfig(train=absolute(held_out), columns=recipe.data.columns), None, "preference")
    items = [item for item, _ in audit.rows(0)][: limit or recipe.eval.limit]
    audit.settle()
    machine = hardware.detect()
    model = RewardModel.load(path, getattr(torch, compute_dtype(recipe.model.dtype, machine)), machine)
    scores = [model.scores([conversations(item.sample)[name] for item in items]) for name in ("chosen", "rejected")]
    right = [float(a > b) for a, b in zip(*scores, strict=True)]
    groups = [None if item.data.get("group") is None else str(item.data["group"]) for item in items]
    values: dict[str, Any] = {"preference_accuracy": mean(right)}
    values["preference_accuracy_ci"] = list(wilson(int(sum(right)), len(right)))
    for group, column in by_group(right, groups).items():
        values[f"preference_accuracy/{group}"] = mean(column)
        values[f"preference_accuracy/{group}_ci"] = list(wilson(int(sum(column)), len(column)))
    values["margin"] = mean([a - b for a, b in zip(*scores, strict=True)])
    return Evaluation(Path(path).name or path, len(items), values, [], right, groups=groups)


def judge(path: str, results: Sequence[Evaluation], rows: Sequence[Conversation]) -> None:
    """Add the mean reward of each model's answers, with a 95% interval."""
    machine = hardware.detect()
    model = RewardModel.load(path, getattr(torch, compute_dtype("auto", machine)), machine)
    asked = [split_reference(row)[0] for row in rows]
    for result in results:
        replies = [{"role": "assistant", "content": text or " "} for text in result.predictions]
        found = model.scores([Conversation([*c.messages, r], c.tools) for c, r in zip(asked, replies, strict=True)])
        result.rewards.extend(found)
        interval = paired([0.0] * len(found), found)
        result.metrics["reward"], result.metrics["reward_ci"] = interval["difference"], interval["ci"]


MOST_GROUPS = 20  # a column `group` with more values names rows rather than kinds of rows


def with_few_groups(rows: list[Conversation]) -> list[Conversation]:
    """The rows, without groups when there are too many to report."""
    names = {row.group for row in rows if row.group is not None}
    if len(names) <= MOST_GROUPS:
        return rows
    note(f"the column `group` has {len(names)} values, over {MOST_GROUPS}: metrics are given for all rows only")
    return [replace(row, group=None) for row in rows]


def quantizations(text: str | None) -> list[str]:
    """`none,int8,int4` as a list."""
    kinds = [kind.strip() for kind in text.split(",")] if text else []
    for kind in kinds:
        if kind not in ("none", "int8", "int4"):
            raise UserError(f"unknown kind {kind!r}", key="--quantization", fix="a list of none, int8, int4")
    return kinds


def quantized(target: Target, kind: str) -> Target:
    model = target.model.model_copy(update={"quantization": None if kind == "none" else kind})
    return replace(target, name=f"{target.name} {kind}", model=model)


def find_targets(runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None) -> list[Target]:
    """What the arguments name. UserError when they name nothing."""
    if recipe is not None:
        loaded = load(recipe, None)
        done = (Path(loaded.output.dir) / "result.json").exists()
        if done:
            return [run_target(loaded.output.dir)]
        return [Target("base", loaded.model, None, loaded.data, loaded.eval)]
    if runs:
        return [run_target(path) for path in runs]
    if adapter is not None:
        return [run_target(adapter, model)]
    if model is not None:
        return [Target(Path(model).name, ModelConfig(name=model), None, DataConfig(train="-"), EvalConfig())]
    raise UserError("nothing to evaluate", fix="give a run directory, --recipe, or --model")


def run_target(reference: str, model: str | None = None) -> Target:
    """A run directory, or an adapter folder made by any PEFT tool."""
    path = Path(reference)
    name = path.name or path.resolve().name
    values = read_recipe(path)
    if values is None:
        folder = loading.adapter_folder(reference)
        config = loading.configs_of(folder, model)[1]
        return Target(name, config, folder, DataConfig(train="-"), EvalConfig())
    recipe = check(values, None, path / "recipe.yaml")
    if recipe.adapter.method == "full":
        return Target(name, ModelConfig(name=str(path / "model")), None, recipe.data, recipe.eval)
    elsewhere = {"name": model, "revision": None, "source": None}
    config = recipe.model if model is None else recipe.model.model_copy(update=elsewhere)
    if model is None and (path / "start").is_dir():  # dpo.start: merge made a base of its own
        merged = {"name": str(path / "start"), "adapter": None, "revision": None, "source": None}
        config = config.model_copy(update=merged)
    return Target(name, config, loading.adapter_folder(reference), recipe.data, recipe.eval)


def evaluate_target(target: Target, rows: Sequence[Any], temperature: float = 0.0, seed: int = 0) -> Evaluation:
    machine = hardware.detect()
    dtype = getattr(torch, compute_dtype(target.model.dtype, machine))
    tokenizer = loading.load_tokenizer(target.model, target.adapter)
    encoder = make_encoder(tokenizer, family(loading.read_config(target.model)["model_type"]))
    model = loading.load_model(target.model, dtype, machine)
    if target.adapter is not None:
        model = loading.attach_adapter(model, target.adapter, target.model)
    with Console(stderr=True).status(f"{target.name}: {len(rows)} rows"):
        limits = (target.eval.max_new_tokens, target.eval.batch_size)
        result = evaluate(target.name, model, encoder, rows, *limits, temperature=temperature, seed=seed)
    result.metrics["weights_gb"] = weight_bytes(model) / 1e9
    return result


def compare(a: Evaluation, b: Evaluation, metric: str = "exact_match") -> dict[str, Any]:
    """b against a on the same rows, or on those of a group (exact_match/GROUP); of losses the lower one wins."""
    name, _, group = metric.partition("/")
    if name == "reward":
        return {"a": a.name, "b": b.name, "metric": metric, **paired(a.rewards, b.rewards)}
    if name in ("exact_match", "preference_accuracy"):
        before, after = (by_group(e.correct, e.groups)[group] if group else e.correct for e in (a, b))
        return {"a": a.name, "b": b.name, "metric": metric, **paired(before, after)}
    result = paired(a.losses, b.losses)
    return {"a": a.name, "b": b.name, "metric": metric, **result, "wins": result["losses"], "losses": result["wins"]}


def cell(result: Evaluation, name: str) -> str:
    value, interval = result.metrics.get(name), result.metrics.get(f"{name}_ci")
    if value is None:
        return "–"
    text = f"{value:.4g}" if name in ("weights_gb", "tokens_per_second") else f"{value:.3f}"
    return text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


WIDE = 3  # more models than this stand below each other, without the single fields


def show(results: Sequence[Evaluation], comparisons: Sequence[dict[str, Any]], title: str = "") -> None:
    """The table and the comparisons, to stdout; `title` goes on after the number of rows."""
    names = list(dict.fromkeys(k for r in results for k, v in r.metrics.items() if isinstance(v, float)))
    fields = list(dict.fromkeys(f for r in results for f in r.metrics.get("fields", {})))
    table = Table(title=f"held-out, n={results[0].n}{title}", title_justify="left")
    if len(results) > WIDE:
        for heading in ("", *(n.replace("_", " ") for n in names)):
            table.add_column(heading, justify="right" if heading else "left")
        for result in results:
            table.add_row(result.name, *(cell(result, name) for name in names))
    else:
        for heading in ("", *(r.name for r in results)):
            table.add_column(heading, justify="right" if heading else "left")
        for name in names:
            table.add_row(name.replace("_", " "), *(cell(r, name) for r in results))
        for field in fields:
            table.add_row(f"  {field}", *(f"{r.metrics.get('fields', {}).get(field, 0.0):.3f}" for r in results))
    Console(file=sys.stdout).print(table)
    for item in comparisons:
        low, high = item["ci"]
        counts = f"{item['wins']} better, {item['losses']} worse, {item['ties']} same"
        name = item["metric"].replace("_", " ")
        print(f"{item['b']} - {item['a']}, {name}: {item['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {counts}")
