"""`ft eval`: held-out metrics of runs, recipes or models, with the base beside them on request.

What is measured follows the rows that are found: conversations, preference pairs, labelled answers, raw text. They are
those of --data, else of the run's eval.data, else those that its data.eval_split held out; of several sets each has a
table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import xxhash

from finetune import metrics
from finetune.adapters.multiple import ActiveAdapter, activated
from finetune.base import Base
from finetune.data.chat_glm import glm_version
from finetune.data.held_out import SPLIT, HeldOut, rows_of, split_off
from finetune.data.thinking import switched
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.evaluation import choices, evaluators, harness, options
from finetune.evaluation import shots as few_shot
from finetune.evaluation.generation import Evaluation, notice
from finetune.evaluation.kept import Kept
from finetune.evaluation.options import overridden, quantizations, refuse
from finetune.evaluation.report import report, write_predictions
from finetune.evaluation.rewards import RewardModel
from finetune.evaluation.sets import Once, Part, bases_of_each, found_in, leaks_of
from finetune.evaluation.targets import Target, bases_of, find_targets, quantized, reference_of
from finetune.metrics import Metric, asked
from finetune.metrics.metric import always
from finetune.models import adapter_files, hardware, sources
from finetune.models.quantization import weight_bytes
from finetune.models.rope import context
from finetune.recipe.resolve import absolute_data, compute_dtype
from finetune.recipe.sections import HeldSet
from finetune.terminal.progress import note, shown_name, warn


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
               "--show-changes": show_changes, "--resume": resume, "--shots-from": shots_from, "--seed": seed,
               "--temperature": temperature}  # fmt: skip
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
                found_in(part, targets, results, [before.get(id(t)) for t in targets], bool(kinds), show_changes)
            )
        if predictions is not None:
            write_predictions(predictions, sets)
        report(sets, json_file, show)
        done = True
    finally:
        kept.close(done)


def measure_tasks(
    targets: Sequence[Target], tasks: str, compare_base: bool, kinds: Sequence[str], shots: int | None,
    limit: int | None, thinking: str | None, json_file: str | None,
) -> None:  # fmt: skip
    """--tasks: lm-evaluation-harness on each model, loaded as everywhere."""
    names = options.tasks(tasks)
    if scorer := next((target for target in targets if target.scores is not None), None):
        raise UserError(f"{scorer.name} is a reward model, and tasks are for models that write", key="--tasks")
    harness.load(names)  # what is wrong with them is said before a model is loaded
    measured = []
    for target in [*(bases_of(targets) if compare_base else ()), *targets]:
        for each in [quantized(target, kind) for kind in kinds] or [target]:
            base = Base.open(each.model, each.adapter or each.template, each.treatment)
            key = "eval.thinking" if thinking is None else "--thinking"
            encoder = base.asking(switched(thinking or each.eval.thinking), key)
            model = load_model(each, base)
            note(f"{each.name}: {', '.join(names)} of lm-evaluation-harness")
            loaded = harness.load(names)
            size = each.eval.batch_size
            measured.append(harness.measure(each.name, model, base, encoder, loaded, shots, limit, size))
    harness.report(measured, json_file, limit)


# --- what is measured ---


def sets_of(target: Target, data: str | Sequence[str] | None) -> list[HeldSet | None]:
    """Those of --data, else of eval.data; None stands for what data.eval_split holds out."""
    return [*(options.named_sets(data) or target.eval.sets)] or [None]


def parts_of(
    found: Sequence[tuple[HeldSet | None, HeldOut]], targets: Sequence[Target], named: Sequence[str] | None,
    shots: int | None, shots_from: str | None, scorer: Target | None, reward: str | None,
) -> list[Part]:  # fmt: skip
    """Each set with what is measured on it. UserError for a metric that is of none of them, and a set that has none."""
    key = "eval.metrics" if named is None else "--metrics"
    named = targets[0].eval.metrics if named is None else named
    failed: dict[str, list[UserError]] = {name: [] for name in named or ()}
    able = {held.kind for _, held in found} & {"answers", "choices"}
    if shots_from is not None and "answers" not in able:
        why = "multiple choice has its shots in the dev files" if able else "shots are before answers"
        refuse({"--shots-from": shots_from}, why)
    parts: list[Part] = []
    for one, held in found:
        # They mean nothing to the other sets beside these.
        number = shots_for(held, shots, targets[0]) if held.kind in able or not able else 0
        usable = named
        if named is not None and len(found) > 1:
            usable = []
            for name in named:
                try:
                    metrics_for(held, [name], key, targets, scorer, reward)
                    usable.append(name)
                except UserError as error:
                    failed[name].append(error)
            if not usable:
                raise failed[named[0]][-1]
        chosen = metrics_for(held, usable, key, targets, scorer, reward if held.kind == "answers" else None)
        if held.kind not in ("text", "choices"):
            held = with_few_groups(held)
        name = shown_name(one.name) if one is not None else held.name
        if name in [part.name for part in parts] and one is not None:
            name = one.name
        asked_with = {"shots": number} if held.kind == "choices" else {}
        if held.kind == "answers" and (number or shots_from is not None):
            held, asked_with = with_shots(held, number, shots_from, targets[0])
        parts.append(Part(name, held, one is not None and one.general, number, chosen, asked_with))
    for errors in failed.values():
        if len(errors) == len(found):
            raise errors[0]
    return parts


def evaluate_sets(target: Target, parts: Sequence[Part], thinking: str | None, kept: Kept) -> dict[str, Evaluation]:
    """Of one model the figures of each set, by its name; it is loaded once."""
    once = Once()
    return {
        part.name: evaluate_target(target, part.held, thinking, part.chosen, part.shots, once, kept) for part in parts
    }


def with_shots(held: HeldOut, number: int, path: str | None, target: Target) -> tuple[HeldOut, dict[str, Any]]:
    """(the rows with their shots, what is said of them). UserError where there are none to be had."""
    if not number:
        raise UserError("has no effect: no shots are given", key="--shots-from", fix="add --shots N")
    named, seed = path or target.eval.shots_from, target.eval.generation.seed
    config = target.data if target.recipe is not None else None
    found = few_shot.find(number, held, named and absolute_data(named), config, seed)
    said = {"shots": number, "shots_from": path or found.source, "shots_seed": seed}
    return replace(held, rows=[row._replace(shots=tuple(found.of(row))) for row in held.rows]), said


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


def held_out(target: Target, one: HeldSet | None, limit: int | None) -> HeldOut:
    """The rows of a set. UserError when there are none."""
    limit = limit or target.eval.limit
    if one is not None:
        return rows_of(absolute_data(one.path), target.data, limit)
    recipe = target.recipe
    if recipe is None or recipe.data.eval_split is None:
        fix = "set it or data.eval_split in the recipe, or give --data FILE"
        raise UserError("no held-out data", key="eval.data", fix=fix)
    place = target.template or target.adapter
    if target.scores is not None:
        place = sources.find_adapter(target.scores)
    encoder = None
    if recipe.stage != "pretrain":
        model = recipe.model.model_copy(update={"adapter": None})
        encoder = Base.open(model, place, recipe.data.thinking).encoder
    note(f"the rows that data.eval_split {recipe.data.eval_split} held out of {target.name}'s training")
    return split_off(recipe, encoder, limit)


def shots_for(held: HeldOut, shots: int | None, target: Target) -> int:
    """How many shots there are. UserError where they have no effect."""
    wanted = target.eval.shots if shots is None else shots
    if held.kind == "choices":
        return choices.shots_of(held, wanted)
    if held.kind == "answers":
        return wanted or 0
    key = "eval.shots" if shots is None else "--shots"
    refuse({key: wanted}, f"shots are before answers or multiple choice, and these rows are {held.kind}")
    return 0


def metrics_for(
    held: HeldOut, named: Sequence[str] | None, key: str, targets: Sequence[Target], scorer: Target | None,
    reward: str | None,
) -> list[Metric]:  # fmt: skip
    """What is measured: what --metrics or eval.metrics names, else what suits the rows, which is said. UserError for
    what cannot be measured on them."""
    rows = evaluators.with_references(held.rows) if held.kind == "answers" else []
    if named is None:
        found = metrics.by_itself(held.kind, rows)
        special = [m.name for m in found if m.unasked is not always and m.kinds == ("answers",)]
        if special:
            note(f"by the references also measured: {', '.join(special)} (--metrics names what is measured)")
        return found
    found = asked.find(named, held.kind, key)
    for metric in found:
        if scorer is not None and metric.needs:
            fix = "name preference_accuracy or margin"
            raise UserError(f"a reward model has only scores, and no {metric.name}", key=key, fix=fix)
        if metric.needs == "reward" and reward is None:
            raise UserError(f"{metric.name} needs a reward model", key=key, fix="name one with --reward RUN")
        if metric.needs == "policy" and all(reference_of(target) is None for target in targets):
            what = f"{metric.name} is measured against a reference, and {targets[0].name} has none"
            raise UserError(what, key=key, fix="give a run of ft dpo or ft kto, or leave it out")
    if held.kind == "answers":
        asked.check_rows(found, rows, key)
    if reward is not None:
        found += [m for m in metrics.by_itself(held.kind, rows) if m.needs == "reward" and m not in found]
    return found


def evaluate_target(
    target: Target, held: HeldOut, thinking: str | None = None, chosen: Sequence[Metric] | None = None, shots: int = 0,
    once: Callable[[Callable[[], Any]], Any] = lambda make: make(), kept: Kept | None = None,
) -> Evaluation:  # fmt: skip
    """The metrics of one model on these rows.

    Args:
        once: what the model is loaded through. kept: the answers of before.
    """
    size, longest = target.eval.batch_size, target.data.max_length
    if target.scores is not None:
        place, dtype = target.scores, target.model.dtype
        scorer = once(lambda: reward_model(place, dtype))
        return evaluators.scores(target.name, scorer, held.rows, longest, chosen)
    # In the chat format that was trained.
    base = Base.open(target.model, target.adapter or target.template, target.treatment)
    encoder: Any = base.encoder if held.kind not in ("text", "choices") or chats(base) else None
    if held.kind == "answers":
        key = "eval.thinking" if thinking is None else "--thinking"
        encoder = base.asking(switched(thinking or target.eval.thinking), key)
    model = once(lambda: load_model(target, base))
    if held.kind == "choices":
        limit, which = (
            context(base.config, target.model),
            metrics.by_itself("choices", []) if chosen is None else chosen,
        )
        result = choices.evaluate(target.name, model, base.tokenizer, encoder, held, shots, size, limit, which)
    elif held.kind == "text":
        length = min(longest, context(base.config, target.model) or longest)
        texts = [sample.text for sample in held.samples]
        whole = held.name == SPLIT
        result = evaluators.text(target.name, model, base.tokenizer, texts, size, length, held.blocks, whole, chosen)
    elif held.kind == "answers":
        limits = (target.eval.max_new_tokens, size)
        before = None if kept is None else kept.of(way_of_asking(target, base, encoder))
        how = target.eval.generation
        rows, said = few_shot.asked(held.rows, encoder, limits[0], context(base.config, target.model))
        result = evaluators.answers(target.name, model, encoder, rows, *limits, how, chosen, before)
        result.notes += [f"{target.name}: {line}" for line in said]
    elif held.kind == "pairs":
        train_on = "last" if target.data.train_on == "last" else "assistant"
        ref = reference(target, model)
        result = evaluators.pairs(target.name, model, encoder, held.rows, size, longest, train_on, ref, chosen)
    else:
        ref = reference(target, model)
        result = evaluators.unpaired(target.name, model, encoder, held.rows, size, longest, ref, chosen)
    result.metrics["weights_gb"] = weight_bytes(model) / 1e9
    return result


def way_of_asking(target: Target, base: Base, encoder: Any) -> dict[str, Any]:
    """All that an answer depends on but the prompt; batches are none of it."""
    adapter = None if target.adapter is None else target.adapter.resolve()
    weights = None if adapter is None else xxhash.xxh3_128_hexdigest(adapter_files.weights(adapter).read_bytes())
    of_model = target.model.model_dump(exclude={"name", "adapter", "revision", "source"})
    how = {"max_new_tokens": target.eval.max_new_tokens, **target.eval.generation.chosen}
    return {"base": base.fingerprint, "adapter": weights, "model": of_model, "stops": encoder.stop_ids, **how}


def chats(base: Base) -> bool:
    """Whether the base, or the adapter on it, brings a chat format: others are asked as a benchmark is published."""
    return bool(base.tokenizer.chat_template) or glm_version(base.tokenizer) is not None


def load_model(target: Target, base: Base | None = None) -> Any:
    """base: what is open of it already."""
    machine = hardware.detect()
    dtype = getattr(torch, compute_dtype(target.model.dtype, machine))
    return replace(base or Base.open(target.model), adapter=target.adapter).load(dtype, machine)


def reward_model(path: str, dtype: str = "auto") -> RewardModel:
    machine = hardware.detect()
    return RewardModel.load(path, getattr(torch, compute_dtype(dtype, machine)), machine)


def reference(target: Target, model: Any) -> evaluators.Reference | None:
    """The reference of a run that has one: the same model with its adapter off where that is it, else another."""
    other = reference_of(target)
    if other is None:
        return None
    beta = getattr(target.recipe, target.recipe.stage).beta
    if target.adapter is not None and other.adapter is None:
        return (lambda: activated(ActiveAdapter(model))), beta
    return (lambda: nullcontext(load_model(replace(other, name=f"{target.name}: its reference")))), beta


def tell(results: Sequence[Evaluation]) -> None:
    """What was not done, of all models, each once."""
    for line in dict.fromkeys(notice(r.generation.get("not_followed") or {}) for r in results):
        if line is not None:
            note(line)
    for line in dict.fromkeys(line for result in results for line in result.notes):
        warn(line)
    if results[0].kind == "answers" and all(r["reference"] is None for r in results[0].rows):
        note("no row has a reference answer: there is nothing to be right about")


def add_rewards(
    path: str, results: Sequence[Evaluation], rows: Sequence[Any], chosen: Sequence[Metric] | None = None
) -> None:
    """Add the mean reward of each model's answers, with a 95% interval, and how often it is above the reference's."""
    model = reward_model(path)

    def scores(texts: Sequence[str], of: Sequence[Any]) -> list[float]:
        """Of answers without white space at both ends, as in `ft ppo`."""
        replies = [{"role": "assistant", "content": text.strip() or " "} for text in texts]
        return model.scores([Conversation([*c.asked, r], c.tools) for c, r in zip(of, replies, strict=True)])

    known = [i for i, row in enumerate(rows) if row.reference is not None]
    references = scores([rows[i].reference for i in known], [rows[i] for i in known]) if known else []
    for result in results:
        for row, value in zip(result.rows, scores(result.predictions, rows), strict=True):
            row["reward"] = value
        for i, value in zip(known, references, strict=True):
            result.rows[i]["reference_reward"] = value
        result.metrics |= metrics.measure(result.kind, result.rows, chosen)


def reply_of(row: dict[str, Any]) -> dict[str, Any]:
    """An answer as a turn, with what was thought before it."""
    thought = {"reasoning_content": row["thinking"]} if row.get("thinking") else {}
    return {"role": "assistant", "content": row["prediction"] or " ", **thought}


MOST_GROUPS = 20  # a column `group` with more values names rows rather than kinds of rows


def with_few_groups(held: HeldOut) -> HeldOut:
    """The rows, without groups when there are too many to report."""
    names = {row.group for row in held.rows if row.group is not None}
    if len(names) <= MOST_GROUPS:
        return held
    note(f"the column `group` has {len(names)} values, over {MOST_GROUPS}: metrics are given for all rows only")
    bare = [replace(s, group=None) if isinstance(s, Conversation) else s for s in (row.sample for row in held.rows)]
    rows = [row._replace(group=None, sample=sample) for row, sample in zip(held.rows, bare, strict=True)]
    return replace(held, rows=rows)
