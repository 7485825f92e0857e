"""The held-out sets of an evaluation: their rows, and what is measured on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune import metrics
from finetune.base import Base
from finetune.data.held_out import HeldOut, rows_of, split_off
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.evaluation import choices, evaluators, options
from finetune.evaluation import shots as few_shot
from finetune.evaluation.options import refuse
from finetune.evaluation.sets import Part
from finetune.evaluation.targets import Target, reference_of
from finetune.metrics import Metric, asked
from finetune.metrics.metric import always
from finetune.models import sources
from finetune.recipe.resolve import absolute_data
from finetune.recipe.sections import HeldSet
from finetune.terminal.progress import note, shown_name


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
            held, asked_with = with_shots(held, number, shots is not None, shots_from, targets[0])
        parts.append(Part(name, held, one is not None and one.general, number, chosen, asked_with))
    for errors in failed.values():
        if len(errors) == len(found):
            raise errors[0]
    return parts


def with_shots(
    held: HeldOut, number: int, told: bool, path: str | None, target: Target
) -> tuple[HeldOut, dict[str, Any]]:
    """(the rows with their shots, what is said of them). UserError where there are none to be had.

    Args:
        told: whether the number, and path: the file, are of the command line.
    """
    if not number:
        raise UserError("has no effect: no shots are given", key="--shots-from", fix="add --shots N")
    named, seed = path or target.eval.shots_from, target.eval.generation.seed
    file_told = path is not None or (told and target.eval.shots_from is None)
    keys = ("--shots" if told else "eval.shots", "--shots-from" if file_told else "eval.shots_from")
    found = few_shot.find(number, held, named and absolute_data(named), target.recipe, seed, keys)
    said = {"shots": number, "shots_from": path or found.source, "shots_seed": seed}
    return replace(held, rows=[row._replace(shots=tuple(found.of(row))) for row in held.rows]), said


def held_out(target: Target, one: HeldSet | None, limit: int | None) -> HeldOut:
    """The rows of a set. UserError when there are none."""
    limit = limit or target.eval.limit
    if one is not None:
        return rows_of(absolute_data(one.path), target.data, limit)
    recipe = target.recipe
    if recipe is None or recipe.data.eval_split is None:
        raise options.no_rows()
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
    wanted, key = (target.eval.shots, "eval.shots") if shots is None else (shots, "--shots")
    if held.kind == "choices":
        return choices.shots_of(held, wanted, key)
    if held.kind == "answers":
        return wanted or 0
    refuse({key: wanted or None}, f"shots are before answers or multiple choice, and these rows are {held.kind}")
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
