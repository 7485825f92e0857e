"""Several held-out sets: what is measured on each, what a run was trained on of them, and what there is to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.held_out import HeldOut, leakage_figures, leaks
from finetune.errors import UserError
from finetune.evaluation.comparisons import changes, comparable, compare, forgotten
from finetune.evaluation.generation import Evaluation
from finetune.evaluation.report import Found
from finetune.evaluation.targets import Target, bases_of
from finetune.metrics import Metric
from finetune.recipe.sections import DataConfig
from finetune.terminal.progress import note


@dataclass(frozen=True)
class Part:
    """A held-out set, and what is measured on it."""

    name: str
    held: HeldOut
    general: bool
    shots: int
    """Of multiple choice."""
    chosen: list[Metric]
    asked_with: dict[str, Any]
    """What table and JSON say of how all models were asked."""


def bases_of_each(tuned: Sequence[Target], there: Sequence[Target]) -> list[Target | None]:
    """The base of each, that which is measured anyway where it is one of `there`; None where it is gone or there is
    none, which is said."""
    found: list[Target | None] = []
    for target in tuned:
        known = [one for one in (*there, *found) if one is not None and not one.trained and one.model == target.base]
        try:
            found.append(known[0] if known else bases_of([target])[0] if target.trained else None)
        except UserError as error:
            note(f"what {target.name} has forgotten is not known: {error.problems[0].message}")
            found.append(None)
    return found


class Once:
    """What is made at the first use, and there for the next ones."""

    def __init__(self) -> None:
        self.made: Any = None

    def __call__(self, make: Callable[[], Any]) -> Any:
        if self.made is None:
            self.made = make()
        return self.made


def drawn_by(recipe: Any) -> tuple[DataConfig, int]:
    """What says which rows a run is trained on, and which are held out."""
    return recipe.data, recipe.train.seed


def leaks_of(targets: Sequence[Target], parts: Sequence[Part]) -> list[dict[str, dict[str, Any]]]:
    """Of each model by set: `trained_on`, how many rows stand in its training data, and `leakage`, how and where;
    nothing where that is not known."""
    found = []
    rows = [(part.name, row) for part in parts for row in part.held.rows]
    apart = next((part.held.hashes for part in parts if part.held.hashes is not None), None)
    split = None if targets[0].recipe is None else drawn_by(targets[0].recipe)
    for target in targets:
        samples, known = [row.sample for _, row in rows], None
        if target.trained and target.recipe is not None:  # which says what was trained, whatever one says now
            data, seed = drawn_by(target.recipe)
            known = leaks(data, samples, seed, apart if (data, seed) == split else None)
        pairs = list(zip(rows, known or [], strict=known is not None))
        found.append(
            {
                part.name: leakage_figures([(row, leak) for (name, row), leak in pairs if name == part.name])
                for part in (parts if known is not None else ())
            }
        )
    return found


def found_in(
    part: Part, targets: Sequence[Target], measured: Sequence[list[Evaluation]],
    before: Sequence[list[Evaluation] | None], by_kind: bool, show_changes: int,
) -> Found:  # fmt: skip
    """What is said of a set.

    Args:
        measured: of each target its kinds. before: of each the base, where it is watched for forgetting. by_kind: each
            model is compared with its first kind, otherwise every model with the first one.
    """
    results = [result for each in measured for result in each]
    also = [result for each in before for result in each or ()]
    in_these = comparable([*results, *also], part.chosen)
    if not in_these and len(results) > 1 and part.held.kind == "text":
        note("the models read other tokens: their losses per token cannot be compared")
    whole = [metric for metric, group in in_these if group is None]
    if part.held.kind == "choices":
        in_these = [(metric, None) for metric in whole]  # there may be 67 subjects
    pairs = [(each[0], other) for each in (measured if by_kind else [results]) for other in each[1:]]
    watched = [
        pair for base, each in zip(before, measured, strict=True) for pair in zip(base or (), each, strict=False)
    ]
    lost = [found for a, b in watched for found in forgotten([compare(a, b, m) for m in whole], part.chosen)]
    there = {(id(a), id(b)) for a, b in pairs}
    pairs += [(a, b) for a, b in watched if (id(a), id(b)) not in there]
    comparisons = [compare(*pair, *one) for pair in pairs for one in in_these]
    changed = [metric for metric in whole if metric.against is None][:1] if show_changes else []
    if show_changes and pairs and not changed:
        note(f"{part.name}: no metric of single rows is compared, and no row has changed in one")
    tuned = [each[0] for target, each in zip(targets, measured, strict=True) if target.trained]
    return Found(
        part.name, part.held.name, results, comparisons, part.chosen, tuned or results[:1], part.asked_with,
        [changes(*pair, metric, show_changes) for pair in pairs for metric in changed], part.general, lost,
    )  # fmt: skip
