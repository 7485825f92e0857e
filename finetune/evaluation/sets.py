"""Several held-out sets: what is measured on each, what a run was trained on of them, and what there is to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data.held_out import HeldOut, leakage_figures, leaks
from finetune.evaluation.comparisons import changes, comparable, compare, forgotten
from finetune.evaluation.generation import Evaluation
from finetune.evaluation.report import Found
from finetune.evaluation.targets import Target, bases_of
from finetune.metrics import Metric
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


def bases_by_target(targets: Sequence[Target], wanted: bool) -> dict[str, Target]:
    """{name of a tuned model: its base}, where it has one."""
    tuned = [target for target in targets if target.trained and target.base is not None] if wanted else []
    return {target.name: base for target in tuned for base in bases_of(tuned) if base.model == target.base}


class Once:
    """What is made at the first use, and there for the next ones."""

    def __init__(self) -> None:
        self.made: Any = None

    def __call__(self, make: Callable[[], Any]) -> Any:
        if self.made is None:
            self.made = make()
        return self.made


def leaks_of(targets: Sequence[Target], parts: Sequence[Part]) -> dict[str, dict[str, dict[str, Any]]]:
    """By tuned model and set: `trained_on`, how many rows stand in its training data, and `leakage`, how and where."""
    split, found = targets[0].recipe, {}
    rows = [(part.name, row) for part in parts for row in part.held.rows]
    apart = next((part.held.hashes for part in parts if part.held.hashes is not None), None)
    for target in targets:
        same = split is not None and target.recipe is not None and target.recipe.data == split.data
        samples = [row.sample for _, row in rows]
        known = leaks(target.data, samples, apart=apart if same else None) if target.trained else None
        if known is not None:
            pairs = list(zip(rows, known, strict=True))
            found[target.name] = {
                part.name: leakage_figures([(row, leak) for (name, row), leak in pairs if name == part.name])
                for part in parts
            }
    return found


def found_in(
    part: Part, targets: Sequence[Target], measured: Sequence[list[Evaluation]], before: dict[str, list[Evaluation]],
    by_kind: bool, show_changes: int,
) -> Found:  # fmt: skip
    """What is said of a set.

    Args:
        measured: of each target its kinds. before: of the tuned ones the bases, of sets that are watched. by_kind: each
            model is compared with its first kind, otherwise every model with the first one.
    """
    results = [result for each in measured for result in each]
    also = [result for each in before.values() for result in each]
    pairs = [(each[0], other) for each in (measured if by_kind else [results]) for other in each[1:]]
    in_these = comparable([*results, *also], part.chosen)
    if not in_these and len(results) > 1 and part.held.kind == "text":
        note("the models read other tokens: their losses per token cannot be compared")
    comparisons = [compare(*pair, *one) for pair in pairs for one in in_these]
    whole = [metric for metric, group in in_these if group is None]
    changed = [m for m in whole if m.against is None][:1] if show_changes else []
    if show_changes and not changed:
        note(f"{part.name}: no metric of single rows is compared, and no row has changed in one")
    lost = []
    for target, each in zip(targets, measured, strict=True):
        if part.general and target.trained and target.name not in before:
            note(f"{part.name}: {target.name} has no base here, and what it has forgotten is not known")
        for base, result in zip(before.get(target.name, ()), each, strict=False):
            lost += forgotten([compare(base, result, metric) for metric in whole], part.chosen)
    tuned = [each[0] for target, each in zip(targets, measured, strict=True) if target.trained]
    held, asked_with = part.held, part.asked_with
    if held.kind == "choices":
        # There may be 67 subjects.
        comparisons = [one for one in comparisons if one["metric"] in {metric.name for metric in whole}]
    return Found(
        part.name, held.name, results, comparisons, part.chosen, tuned or results[:1], asked_with,
        [changes(*pair, metric, show_changes) for pair in pairs for metric in changed], part.general, lost,
    )  # fmt: skip
