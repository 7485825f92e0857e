"""`ft eval`: held-out metrics of runs, recipes or models, with the base beside them on request.

What is measured follows the rows that are found: conversations, preference pairs, labelled answers, raw text. They are
those of --data, else of the run's eval.data, else those that its data.eval_split held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from finetune import metrics
from finetune.adapters.multiple import ActiveAdapter, activated
from finetune.base import Base
from finetune.data.chat_glm import glm_version
from finetune.data.held_out import SPLIT, HeldOut, rows_of, split_off, trained_on
from finetune.data.thinking import switched
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.evaluation import choices, evaluators, options
from finetune.evaluation.generation import Evaluation, notice
from finetune.evaluation.options import overridden, quantizations, refuse
from finetune.evaluation.report import compare, report, write_predictions
from finetune.evaluation.rewards import RewardModel
from finetune.evaluation.targets import Target, bases_of, find_targets, quantized, reference_of
from finetune.metrics import Metric, asked
from finetune.metrics.metric import always
from finetune.models import hardware, sources
from finetune.models.quantization import weight_bytes
from finetune.models.rope import context
from finetune.recipe.resolve import absolute_data, compute_dtype
from finetune.terminal.progress import note, warn


def run(
    runs: Sequence[str], *, recipe: str | None = None, model: str | None = None, adapter: str | None = None,
    data: str | None = None, compare_base: bool = False, limit: int | None = None, json_file: str | None = None,
    quantization: str | None = None, temperature: float | None = None, seed: int | None = None,
    reward: str | None = None, predictions: str | None = None, show: int = 3, thinking: str | None = None,
    named: Sequence[str] | None = None, shots: int | None = None,
) -> None:  # fmt: skip
    options.check(runs, recipe, model, adapter, data, json_file, quantization, predictions, named)
    kinds = quantizations(quantization)
    written = {"temperature": temperature, "seed": seed}
    targets = [with_settings(t, written) for t in find_targets(runs, recipe, model, adapter, compare_base)]
    given = {"--model": model, "--compare-base": compare_base, "--quantization": quantization, "--reward": reward}
    scorer = only_scores(targets, given)
    held = held_out(targets[0], data, limit)
    if scorer is not None and held.kind != "pairs":
        raise UserError("a reward model is measured on preference pairs", path=held.name, fix="give pairs with --data")
    drawn: dict[str, Any] = {"--temperature": temperature, "--seed": seed, "--thinking": thinking}
    if scorer is not None or held.kind != "answers":
        refuse({**drawn, "--reward": reward}, f"on {held.kind if scorer is None else 'pairs'} nothing is answered")
    number = shots_for(held, shots, targets[0])
    chosen = metrics_for(held, named, targets, scorer, reward)
    if held.kind == "answers" and not any(metric.needs in ("prediction", "reward") for metric in chosen):
        refuse(drawn, "none of the metrics needs answers, and none are written")
    split = targets[0].recipe
    if compare_base:
        targets = [*bases_of(targets), *targets]
    if held.kind not in ("text", "choices"):
        held = with_few_groups(held)

    variants = [[quantized(target, kind) for kind in kinds] for target in targets] if kinds else [[t] for t in targets]
    measured = [[evaluate_target(t, held, thinking, chosen, number) for t in part] for part in variants]
    results = [result for part in measured for result in part]
    for target, part in zip(targets, measured, strict=True):
        same = split is not None and target.recipe is not None and target.recipe.data == split.data
        known = trained_on(target.data, held.samples, apart=held.hashes if same else None) if target.trained else None
        for result in part if known is not None else ():
            result.metrics["trained_on"] = known
    tell(results)
    if reward is not None:
        add_rewards(reward, results, held.samples, chosen)

    # With quantizations each model is compared with its first kind, otherwise every model with the first one.
    groups = measured if kinds else [results]
    in_these = metrics.compared(held.kind, [result.metrics for result in results], chosen)
    if held.kind == "text" and len({tuple(row["tokens"] for row in result.rows) for result in results}) > 1:
        note("the models read other tokens: their losses per token cannot be compared")
        in_these = []
    comparisons = [compare(part[0], other, *one) for part in groups for other in part[1:] for one in in_these]
    if held.kind == "choices":
        in_these = [(metric, group) for metric, group in in_these if group is None]  # there may be 67 subjects
    tuned = [part[0] for target, part in zip(targets, measured, strict=True) if target.trained]
    if predictions is not None:
        write_predictions(predictions, results)
    about = {metric.name: metric.normalises for metric in chosen if metric.normalises}
    asked_with = {"shots": number} if held.kind == "choices" else {}
    report(held.name, results, comparisons, json_file, asked_with, tuned or results[:1], show, about)


def with_settings(target: Target, options: dict[str, Any]) -> Target:
    """The target whose answers are written as its recipe and these options say."""
    how = overridden(target.eval.generation, options)
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


def held_out(target: Target, data: str | None, limit: int | None) -> HeldOut:
    """The rows to measure on. UserError when there are none."""
    limit = limit or target.eval.limit
    named = data or target.eval.data
    if named is not None:
        return rows_of(absolute_data(named), target.data, limit)
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
    key = "eval.shots" if shots is None else "--shots"
    refuse({key: wanted}, f"shots are for multiple choice, and these rows are {held.kind}")
    return 0


def metrics_for(
    held: HeldOut, named: Sequence[str] | None, targets: Sequence[Target], scorer: Target | None, reward: str | None
) -> list[Metric]:
    """What is measured: what --metrics or eval.metrics names, else what suits the rows, which is said. UserError for
    what cannot be measured on them."""
    rows = evaluators.with_references(held.rows) if held.kind == "answers" else []
    key = "eval.metrics" if named is None else "--metrics"
    named = targets[0].eval.metrics if named is None else named
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
) -> Evaluation:  # fmt: skip
    """The metrics of one model on these rows."""
    size, longest = target.eval.batch_size, target.data.max_length
    if target.scores is not None:
        scorer = reward_model(target.scores, target.model.dtype)
        return evaluators.scores(target.name, scorer, held.rows, longest, chosen)
    # In the chat format that was trained.
    base = Base.open(target.model, target.adapter or target.template, target.treatment)
    encoder: Any = base.encoder if held.kind not in ("text", "choices") or chats(base) else None
    if held.kind == "answers":
        key = "eval.thinking" if thinking is None else "--thinking"
        encoder = base.asking(switched(thinking or target.eval.thinking), key)
    model = load_model(target, base)
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
        result = evaluators.answers(target.name, model, encoder, held.rows, *limits, target.eval.generation, chosen)
    elif held.kind == "pairs":
        train_on = "last" if target.data.train_on == "last" else "assistant"
        ref = reference(target, model)
        result = evaluators.pairs(target.name, model, encoder, held.rows, size, longest, train_on, ref, chosen)
    else:
        ref = reference(target, model)
        result = evaluators.unpaired(target.name, model, encoder, held.rows, size, longest, ref, chosen)
    result.metrics["weights_gb"] = weight_bytes(model) / 1e9
    return result


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
