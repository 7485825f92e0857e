"""What `ft eval` measures: a metric is a row of METRICS. No torch.

`metric` says what a row is; `text`, `json_answers`, `numbers` and `corpus` compare answers with references,
`statistics` makes the intervals, `asked` finds what a recipe or --metrics names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.metrics import corpus, numbers, text
from finetune.metrics.json_answers import fields, has_json, json_fields, json_valid
from finetune.metrics.metric import (
    Metric,
    Row,
    Whole,
    by_group,
    drawn_rows,
    entry,
    never,
    of_all,
    of_texts,
    share,
    share_or_mean,
    weighted,
    weighted_mean,
)
from finetune.metrics.scaling import doubling, fit_power_law
from finetune.metrics.statistics import Z95, apart_interval, mean, paired, perplexity, ratio_interval, wilson
from finetune.metrics.text import exact_match

__all__ = [
    "METRICS", "Metric", "Row", "Whole", "by_group", "by_itself", "compared", "doubling", "drawn_rows", "exact_match",
    "fields", "fit_power_law", "json_fields", "mean", "measure", "paired", "perplexity", "ratio_interval", "score",
    "share", "share_or_mean", "weighted", "weighted_mean", "wilson",
]  # fmt: skip


def loss_to_lower(row: Row) -> float | None:
    """Nats per token; None of an unpaired answer that is not to be learned."""
    loss: float | None = row["loss"]
    return None if row.get("label") is False else loss


def tokens(row: Row) -> float:
    return float(row["loss_tokens"])


LOSS = Metric(
    "loss", ("answers", "pairs", "unpaired", "text"), loss_to_lower, weighted, lower_is_better=True, weight=tokens,
    needs="loss",
)  # fmt: skip
BAD_LOSS = Metric(
    "bad_loss", ("unpaired",), lambda row: row["loss"] if row["label"] is False else None, weighted, weight=tokens,
    compared=False, needs="loss",
)  # fmt: skip


def perplexity_of(rows: Sequence[Row]) -> Whole | None:
    values, weights = LOSS.values(rows)
    if not values:
        return None
    return Whole(perplexity(weighted_mean(values, weights)), [*map(perplexity, weighted(values, weights))])


def margin_of_losses(rows: Sequence[Row]) -> Whole | None:
    return _between(LOSS.values(rows), BAD_LOSS.values(rows))


def margin_of_rewards(rows: Sequence[Row]) -> Whole | None:
    known = [row for row in rows if row["answer_reward"] is not None]
    bad, good = ([row["answer_reward"] for row in known if row["label"] is side] for side in (False, True))
    return _between((bad, [1.0] * len(bad)), (good, [1.0] * len(good)))


def _between(a: tuple[list[float], list[float]], b: tuple[list[float], list[float]]) -> Whole | None:
    """The mean of b minus that of a, both (values, weights) of other rows."""
    if not (a[0] and b[0]):
        return None
    return Whole(weighted_mean(*b) - weighted_mean(*a), apart_interval(a, b))


def won(row: Row) -> float | None:
    """1 where the answer has the higher reward than the reference, a half where both have the same."""
    if row.get("reward") is None or row.get("reference_reward") is None:
        return None
    return 0.5 if row["reward"] == row["reference_reward"] else float(row["reward"] > row["reference_reward"])


def mean_of_subjects(key: str) -> Any:
    """The mean of the groups' shares, each counting the same; None for a single group. The variance of each is taken
    with two right and two wrong rows more (Agresti and Coull 1998): five wrong ones are not surely none."""

    def whole(rows: Sequence[Row]) -> Whole | None:
        known = [row for row in rows if row.get(key) is not None]
        groups = by_group([float(row[key]) for row in known], [row.get("group") for row in known])
        if len(groups) < 2:
            return None
        value = mean([mean(values) for values in groups.values()])
        variance = 0.0
        for values in groups.values():
            p = (sum(values) + 2) / (len(values) + 4)
            variance += p * (1 - p) / len(values)
        half = Z95 * math.sqrt(variance) / len(groups)
        return Whole(value, [max(0.0, value - half), min(1.0, value + half)])

    return whole


ANSWERS, CHOICES = ("answers",), ("choices",)
ROUGE = "case, punctuation and white space do not count; Chinese is compared by character"
JIEBA = "white space and how often an n-gram occurs do not count; words are jieba's"
BY_LETTER = "of the letters of the options the most probable one"
BY_ANSWER = "of the options' texts the most probable one per character"

METRICS: list[Metric] = [
    Metric(
        "number_match", ANSWERS, of_texts(numbers.number_match), share, by_group=True, unasked=numbers.are_marked,
        normalises="the number behind ####, else the last one, counts and nothing else; 1,234 is 1234.0",
    ),
    Metric(
        "exact_match", ANSWERS, of_texts(exact_match), share, by_group=True,
        normalises="white space at both ends does not count",
    ),
    Metric(
        "normalised_match", ANSWERS, of_texts(text.normalised_match), share, by_group=True, unasked=never,
        normalises="case, width (NFKC), punctuation outside of numbers and white space around Chinese do not count",
    ),
    Metric(
        "token_f1", ANSWERS, of_texts(text.token_f1), drawn_rows, by_group=True, unasked=never,
        normalises="as normalised_match; nor does the order of words (of Chinese: characters)",
    ),
    Metric(
        "choice_accuracy", CHOICES, entry("letter_right"), share, by_group=True, needs="letter", normalises=BY_LETTER
    ),
    of_all(
        "choice_accuracy_macro", CHOICES, mean_of_subjects("letter_right"), needs="letter",
        normalises="the mean of the subjects, each counting the same",
    ),
    Metric(
        "choice_accuracy_full", CHOICES, entry("full_right"), share, by_group=True, unasked=never, needs="full",
        normalises=BY_ANSWER,
    ),
    of_all(
        "choice_accuracy_full_macro", CHOICES, mean_of_subjects("full_right"), unasked=never, needs="full",
        normalises="the mean of the subjects, each counting the same",
    ),
    Metric("preference_accuracy", ("pairs",), entry("correct"), share, by_group=True, needs=""),
    Metric("reward_accuracy", ("unpaired",), entry("correct"), share, by_group=True, needs="policy"),
    Metric("margin", ("pairs",), entry("margin"), weighted, compared=False, needs=""),
    Metric(
        "json_valid", ANSWERS, json_valid, share, by_group=True, compared=False, unasked=has_json,
        normalises="white space around the JSON does not count",
    ),
    Metric(
        "field_accuracy", ANSWERS, lambda row: mean([*fields(row).values()]) if fields(row) else None, weighted,
        weight=lambda row: len(fields(row)), compared=False, unasked=has_json,
        normalises="order and spacing of the JSON do not count; 1 is 1.0, true is not 1",
    ),
    of_all(
        "bleu", ANSWERS, corpus.bleu.whole, against=corpus.bleu.against, unasked=never, package="sacrebleu",
        normalises="0 to 100; white space does not count, case does",
    ),
    of_all(
        "chrf", ANSWERS, corpus.chrf.whole, against=corpus.chrf.against, unasked=never, package="sacrebleu",
        normalises="0 to 100; white space does not count, case does",
    ),
    *(
        Metric(name, ANSWERS, of_texts(text.rouge(n)), drawn_rows, by_group=True, unasked=never, normalises=ROUGE)
        for name, n in (("rouge1", 1), ("rouge2", 2), ("rougeL", 0))
    ),
    *(
        Metric(
            f"{name}_jieba", ANSWERS, of_texts(text.rouge_jieba(n)), drawn_rows, unasked=never, package="jieba",
            normalises=JIEBA,
        )
        for name, n in (("rouge1", 1), ("rouge2", 2), ("rougeL", 0))
    ),
    Metric(
        "bleu4_char", ANSWERS, of_texts(text.character_bleu4), drawn_rows, unasked=never,
        normalises="0 to 1, the mean of the rows; nothing is left out, compared by character",
    ),
    LOSS,
    of_all("perplexity", LOSS.kinds, perplexity_of, needs="loss"),
    Metric(
        "token_accuracy", LOSS.kinds, lambda row: None if row.get("label") is False else row.get("token_accuracy"),
        weighted, weight=tokens, unasked=never, needs="loss",
    ),
    BAD_LOSS,
    of_all("margin", ("unpaired",), margin_of_losses, needs="loss"),
    Metric(
        "reward_accuracy", ("pairs",), lambda row: float(row["reward_margin"] > 0) if "reward_margin" in row else None,
        share, compared=False, needs="policy",
    ),
    Metric("reward_margin", ("pairs",), entry("reward_margin"), weighted, compared=False, needs="policy"),
    of_all("reward_margin", ("unpaired",), margin_of_rewards, needs="policy"),
    Metric("reward", ANSWERS, entry("reward"), drawn_rows, needs="reward"),
    Metric("win_rate", ANSWERS, won, share_or_mean, compared=False, needs="reward"),
]  # fmt: skip


def by_itself(kind: str, rows: Sequence[Row]) -> list[Metric]:
    """What is measured on such rows when no metric is named."""
    return [metric for metric in METRICS if kind in metric.kinds and metric.unasked(rows)]


def score(rows: Sequence[dict[str, Any]], chosen: Sequence[Metric]) -> None:
    """Note in each row what the metrics of answers say of it, each computed once: `--predictions` shows it."""
    for metric in chosen:
        if metric.needs == "prediction" and metric.of_all is None:
            for row in rows:
                if row.get("prediction") is not None:
                    row.setdefault("metrics", {})[metric.name] = metric.function(row)


def measure(kind: str, rows: Sequence[Row], chosen: Sequence[Metric] | None = None) -> dict[str, Any]:
    """{NAME, NAME_ci, NAME/GROUP, NAME/GROUP_ci, NAME/GROUP_n, …}, and `groups`: how many rows of each the first metric
    is of.

    chosen: only these.
    """
    found: dict[str, Any] = {}
    for metric in by_itself(kind, rows) if chosen is None else chosen:
        found |= metric.figures(rows)
        for group, members in metric.groups(rows).items():
            found |= metric.figures(members, group) | {f"{metric.named(group)}_n": len(members)}
            found.setdefault("groups", {}).setdefault(group, len(members))
    return found


def compared(
    kind: str, figures: Sequence[Mapping[str, Any]], chosen: Sequence[Metric] | None = None
) -> list[tuple[Metric, str | None]]:
    """(metric, group of rows or None for all) of those in which models with these figures can be compared."""
    groups = [None, *figures[0].get("groups", ())]
    found = [
        (metric, group)
        for metric in (METRICS if chosen is None else chosen)
        if metric.compared and kind in metric.kinds
        for group in (groups if metric.by_group else [None])
    ]
    return [(metric, group) for metric, group in found if all(metric.named(group) in each for each in figures)]
