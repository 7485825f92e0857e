"""Held-out rows that are answered while a run trains (`eval.during`), as `ft eval` would answer them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune import metrics
from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.held_out import HeldOut, HeldRow, rows_of, split_off
from finetune.data.thinking import switched
from finetune.data.types import Conversation, Preference, Unpaired
from finetune.errors import UserError
from finetune.evaluation import shots
from finetune.evaluation.evaluators import with_references
from finetune.evaluation.generation import evaluate
from finetune.metrics import Metric, asked
from finetune.models.rope import context
from finetune.recipe.sections import EvalConfig
from finetune.recipe.stages import Recipe
from finetune.terminal.progress import note, warn

KEY = "eval.during.metrics"
SHOWN = 4
"""Answers that are kept of each evaluation, to be looked at."""


@dataclass
class During:
    rows: Sequence[HeldRow]
    metrics: Sequence[Metric]
    encoder: Encoder
    section: EvalConfig
    steps: int | None
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Of the last figures: {prompt, reply, score} of the first rows."""

    def due(self, step: int) -> bool:
        return self.steps is None or step % self.steps == 0

    def figures(self, model: Any, doing: Callable[[str], None]) -> dict[str, Any]:
        """{NAME, NAME_ci} of each metric. The model is in eval mode afterwards."""
        done = 0

        def told(count: int) -> None:
            nonlocal done
            done += count
            doing(f"answering held-out rows {done:,}/{len(self.rows):,}")

        known = [{"file": row.file, "row": row.row, "columns": row.columns} for row in self.rows]
        found = evaluate(
            "", model, self.encoder, [row.sample for row in self.rows], self.section.max_new_tokens,
            self.section.batch_size, told, self.section.generation, self.metrics, known,
        )  # fmt: skip
        self.samples = [as_sample(row, self.metrics[0]) for row in found.rows[:SHOWN]]
        return figures_of(self.metrics, found.rows)


def as_sample(row: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """A line of samples.jsonl: the last turn that was asked, the answer, and its first figure."""
    value = metric.of(row)
    asked = row["messages"][-1]["content"] if row.get("messages") else ""
    return {"prompt": str(asked), "reply": str(row.get("prediction")), "score": None if value is None else float(value)}


def figures_of(chosen: Sequence[Metric], rows: Sequence[Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in chosen:
        figures |= metric.figures(rows)
    return {name: value for name, value in figures.items() if not isinstance(value, str)}


def prepare(recipe: Recipe, base: Base) -> During | None:
    """What the recipe asks for; None where it asks for nothing. UserError when the rows, or the metrics on them, are
    not to be had, before any weights are loaded."""
    wanted = recipe.eval.during
    if wanted is None:
        return None
    held = held_out(recipe, base.encoder, wanted.limit)
    rows: Sequence[HeldRow] = held.rows
    chosen = metrics_of(recipe, rows)
    encoder = base.asking(switched(recipe.eval.thinking), "eval.thinking")
    if number := recipe.eval.shots:
        pool = shots.find(number, held, recipe.eval.shots_from, recipe, recipe.eval.generation.seed)
        given = [row._replace(shots=tuple(pool.of(row))) for row in rows]
        limit = context(base.config, base.model)
        rows, said = shots.asked(given, encoder, recipe.eval.max_new_tokens, limit)
        for line in said:
            warn(line)
    how = f"{len(rows)} held-out rows, {', '.join(metric.name for metric in chosen)}, {recipe.eval.generation}"
    note(f"answered while training: {how}")
    return During(rows, chosen, encoder, recipe.eval, wanted.steps)


def held_out(recipe: Recipe, encoder: Encoder, limit: int) -> HeldOut:
    """The first rows of eval.data (of several sets the first that is not general), otherwise those of
    data.eval_split."""
    limit = min(limit, recipe.eval.limit or limit)
    if (first := recipe.eval.first) is not None:
        if len(recipe.eval.sets) > 1:
            note(f"of the sets in eval.data {first.name} is answered while training")
        found = rows_of(first.path, recipe.data, None)
    else:
        found = split_off(recipe, encoder, None)
    if found.kind in ("text", "choices"):
        what, fix = f"measures answers, and these rows are {found.kind}", "leave it out, or name others as eval.data"
        raise UserError(what, path=found.name, key="eval.during", fix=fix)
    rows = with_answers(found.rows)[:limit]
    if not any(row.sample.reference is not None for row in rows):
        fix = "leave it out, or give rows with answers as eval.data"
        raise UserError("no row has a reference to measure answers by", path=found.name, key="eval.during", fix=fix)
    return replace(found, rows=rows)


def with_answers(rows: Sequence[HeldRow]) -> list[HeldRow]:
    """As conversations: of a pair the chosen answer is the reference, of labelled answers the good ones are."""
    found = []
    for row in rows:
        sample = row.sample
        if isinstance(sample, Unpaired) and not sample.label:
            continue
        if isinstance(sample, Preference):
            sample = sample.conversations()["chosen"]
        elif isinstance(sample, Unpaired):
            sample = sample.conversations()[""]
        assert isinstance(sample, Conversation)
        found.append(row._replace(sample=replace(sample, group=None, rival=None), group=None))
    return found


def of_replies(section: EvalConfig, rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """What `ft ppo` measures of replies beside their scores: what is named. rows: the held-out ones, with the reference
    as the answer."""
    named = section.during.metrics if section.during is not None else None
    found = asked.find(named or (), "answers", KEY)
    written_ones(found)
    asked.check_rows(found, rows, KEY)
    return found


def metrics_of(recipe: Recipe, rows: Sequence[HeldRow]) -> list[Metric]:
    """Those that are named, else those that suit the rows. UserError for what is not of answers."""
    assert recipe.eval.during is not None
    named, tried = recipe.eval.during.metrics, with_references(rows)
    if named is None:
        found = [metric for metric in metrics.by_itself("answers", tried) if metric.needs == "prediction"]
    else:
        found = asked.find(named, "answers", KEY)
        written_ones(found)
        asked.check_rows(found, tried, KEY)
    best = recipe.best_in
    if recipe.keeps_best and recipe.best_in_answers and best not in (None, *(metric.name for metric in found)):
        fix = f"one of {', '.join(metric.name for metric in found)}, or name it in {KEY}"
        raise UserError(f"{best} is not measured", key="train.metric_for_best_model", fix=fix)
    return found


def written_ones(found: Sequence[Metric]) -> None:
    """UserError for metrics of something else than written answers."""
    for metric in found:
        if metric.needs != "prediction":
            fix = "the held-out loss is measured with data.eval_split" if metric.needs == "loss" else "name another"
            raise UserError(f"{metric.name} is no metric of written answers", key=KEY, fix=fix)
