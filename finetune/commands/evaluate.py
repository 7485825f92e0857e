"""`ft eval`: held-out metrics of runs, recipes or models, with the base beside them on request.

What is measured follows the rows that are found: conversations, preference pairs, labelled answers, raw text. They are
those of --data, else of the run's eval.data, else those that its data.eval_split held out; of several sets each has a
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.base import Base
from finetune.data.thinking import switched
from finetune.errors import UserError
from finetune.evaluation import harness, harness_tasks, options, recorded
from finetune.evaluation.generation import Evaluation, notice
from finetune.evaluation.kept import Kept
from finetune.evaluation.measuring import add_rewards, chats, evaluate_sets, load_model
from finetune.evaluation.options import overridden, quantizations, refuse
from finetune.evaluation.parts import held_out, parts_of, sets_of
from finetune.evaluation.report import report, write_predictions
from finetune.evaluation.sets import bases_of_each, found_in, leaks_of
from finetune.evaluation.targets import Target, bases_of, find_targets, quantized
from finetune.models.rope import context
from finetune.recipe.file import load
from finetune.terminal.progress import note, warn


def run(
    runs: Sequence[str], *, recipe: str | None = None, model: str | None = None, adapter: str | None = None,
    data: str | Sequence[str] | None = None, compare_base: bool = False, limit: int | None = None,
    json_file: str | None = None, quantization: str | None = None, temperature: float | None = None,
    seed: int | None = None, reward: str | None = None, predictions: str | None = None, show: int = 3,
    thinking: str | None = None, named: Sequence[str] | None = None, shots: int | None = None, show_changes: int = 0,
    resume: bool = False, shots_from: str | None = None, tasks: str | None = None,
) -> None:  # fmt: skip
    options.check(runs, recipe, model, adapter, data, json_file, quantization, predictions, named)
    if tasks is not None:
        own = {"--data": data, "--metrics": named, "--reward": reward, "--predictions": predictions,
               "--show-changes": show_changes or None, "--resume": resume, "--shots-from": shots_from, "--seed": seed,
               "--temperature": temperature, "--show": show if show not in (0, 3) else None}  # fmt: skip
        refuse(own, "--tasks hands over to lm-evaluation-harness, whose tasks say it")
        asked_of, kinds = find_targets(runs, recipe, model, adapter, compare_base), quantizations(quantization)
        measure_tasks(asked_of, tasks, compare_base, kinds, shots, limit, thinking, json_file)
        return
    kinds = quantizations(quantization)
    written = {"temperature": temperature, "seed": seed}
    targets = [with_settings(t, written, shots) for t in find_targets(runs, recipe, model, adapter, compare_base)]
    given = {"--model": model, "--compare-base": compare_base, "--quantization": quantization, "--reward": reward}
    scorer = only_scores(targets, given)
    found = [(one, held_out(targets[0], one, limit)) for one in sets_of(targets[0], data)]
    for _, held in found if scorer is not None else ():
        if held.kind != "pairs":
            what = "a reward model is measured on preference pairs"
            raise UserError(what, path=held.name, fix="give pairs with --data")
    drawn: dict[str, Any] = {"--temperature": temperature, "--seed": seed, "--thinking": thinking, "--resume": resume}
    there = list(dict.fromkeys(held.kind for _, held in found))
    if scorer is not None or "answers" not in there:
        why = f"on {' and '.join(there) if scorer is None else 'pairs'} nothing is answered"
        refuse({**drawn, "--reward": reward}, why)
    parts = parts_of(found, targets, named, shots, shots_from, scorer, reward)
    wanted = {metric.needs for part in parts if part.held.kind == "answers" for metric in part.chosen}
    if "answers" in there and not wanted & {"prediction", "reward"}:
        if any("shots_seed" in part.asked_with for part in parts):
            del drawn["--seed"]  # shots are drawn by it
        refuse(drawn, "none of the metrics needs answers, and none are written")
    tuned = targets
    if compare_base:
        targets = [*bases_of(targets), *targets]
    bases = bases_of_each(tuned, targets) if any(part.general for part in parts) else [None] * len(tuned)
    models = [*(base for base in bases if base is not None), *targets]
    if show_changes and len(models) * max(1, len(kinds)) < 2:
        refuse({"--show-changes": show_changes}, "there is one model, and nothing to compare it with (--compare-base)")

    kept = Kept(resume)
    done = False
    try:
        measured: dict[int, list[dict[str, Evaluation]]] = {}  # by a target's id: of each of its kinds the sets by name
        for target in models:
            if id(target) not in measured:
                watched = [part for part in parts if part.general or target in targets]
                variants = [quantized(target, kind) for kind in kinds] or [target]
                measured[id(target)] = [evaluate_sets(each, watched, thinking, kept) for each in variants]
        leaked = dict(zip(map(id, tuned), leaks_of(tuned, parts), strict=True))
        sets = []
        for part in parts:
            results = [[each[part.name] for each in measured[id(target)]] for target in targets]
            for target, each in zip(targets, results, strict=True):
                for result in each:
                    result.metrics |= leaked.get(id(target), {}).get(part.name, {})
            before = {
                id(target): [each[part.name] for each in measured[id(base)]]
                for target, base in zip(tuned, bases, strict=True)
                if part.general and base is not None
            }
            every = list({id(r): r for each in (*results, *before.values()) for r in each}.values())
            tell(every)
            if reward is not None and part.held.kind == "answers":
                add_rewards(reward, every, part.held.samples, part.chosen)
            sets.append(
                found_in(part, targets, results, [before.get(id(t)) for t in targets], len(kinds) > 1, show_changes)
            )
        if predictions is not None:
            write_predictions(predictions, sets)
        report(sets, json_file, show)
        if not kinds:
            recorded.keep(named_by(runs, recipe, model, adapter), tuned, targets, sets)
        done = True
    except KeyboardInterrupt:
        kept.interrupted()
        raise
    finally:
        kept.close(done)


def named_by(runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None) -> Sequence[str]:
    """What the targets were named by, in their order: for `--recipe` its run directory."""
    if recipe is not None:
        return [load(recipe, None).output.dir]
    return runs or [str(adapter or model)]


def measure_tasks(
    targets: Sequence[Target], tasks: str, compare_base: bool, kinds: Sequence[str], shots: int | None,
    limit: int | None, thinking: str | None, json_file: str | None,
) -> None:  # fmt: skip
    """--tasks: lm-evaluation-harness on each model, loaded as everywhere."""
    names = options.tasks(tasks)
    if scorer := next((target for target in targets if target.scores is not None), None):
        raise UserError(f"{scorer.name} is a reward model, and tasks are for models that write", key="--tasks")
    loaded = harness_tasks.load(names)
    opened = []
    for target in [*(bases_of(targets) if compare_base else ()), *targets]:
        for each in [quantized(target, kind) for kind in kinds] or [target]:
            base = Base.open(each.model, each.adapter or each.template, each.treatment)
            key = "eval.thinking" if thinking is None else "--thinking"
            asked = switched(thinking or each.eval.thinking)
            encoder = base.asking(asked, key) if chats(base) else None
            length = context(base.config, base.model)
            harness_tasks.check(loaded, each.name, length, shots, harness.templates(encoder))
            opened.append((each, base, encoder))
    measured = []
    for each, base, encoder in opened:  # what is wrong with tasks or models is said before one is loaded
        model = load_model(each, base)
        note(f"{each.name}: {', '.join(names)} of lm-evaluation-harness")
        size = each.eval.batch_size
        tasks_of_it = harness_tasks.load(names)  # tasks are used once
        measured.append(harness.measure(each.name, model, base, encoder, tasks_of_it, shots, limit, size))
        del model
    harness.report(measured, json_file, limit, len(kinds))


def with_settings(target: Target, options: dict[str, Any], shots: int | None = None) -> Target:
    """The target whose answers are written as its recipe and these options say. The seed is also that of shots."""
    how, seed = target.eval.generation, options["seed"]
    if seed is not None and (target.eval.shots if shots is None else shots):
        how = how.model_copy(update={"seed": seed})
        drawn = how.drawn if options["temperature"] is None else options["temperature"] > 0
        options = options if drawn else {**options, "seed": None}
    how = overridden(how, options)
    return replace(target, eval=target.eval.model_copy(update={"generation": how}))


def only_scores(targets: Sequence[Target], given: dict[str, Any]) -> Target | None:
    """The first reward model among the targets, or None. UserError for options without effect on it, and for others
    beside it."""
    scorers = [target for target in targets if target.scores is not None]
    if not scorers:
        return None
    refuse(given, f"{scorers[0].name} is a reward model, which has only scores to compare")
    if len(scorers) < len(targets):
        what = f"{scorers[0].name} is a reward model, and the others write answers"
        raise UserError(what, fix="evaluate them one after the other (--reward lets one score the others' answers)")
    return scorers[0]


def tell(results: Sequence[Evaluation]) -> None:
    """What was not done, of all models, each once."""
    for line in dict.fromkeys(notice(r.generation.get("not_followed") or {}) for r in results):
        if line is not None:
            note(line)
    for line in dict.fromkeys(line for result in results for line in result.notes):
        warn(line)
    if results[0].kind == "answers" and all(r["reference"] is None for r in results[0].rows):
        note("no row has a reference answer: there is nothing to be right about")
