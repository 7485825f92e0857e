"""BLEU and chrF: figures of all rows together, by sacrebleu. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from finetune.metrics.metric import Row, Whole
from finetune.metrics.statistics import drawn_sums, middle, paired
from finetune.metrics.text import CHINESE


class Counts(NamedTuple):
    metric: Any
    """One of sacrebleu's."""
    rows: np.ndarray
    """[rows, k]: what it counts in each; the score of a corpus is one of their sum."""

    def score(self, sums: np.ndarray) -> float:
        return float(self.metric._compute_score_from_stats([int(n) for n in sums]).score)


class Corpus:
    """A figure of sacrebleu's, 0 to 100, with bootstrap intervals over rows.

    make: of (the module sacrebleu.metrics, the tokenizer that suits the references) one of its metrics. What it counts
    in a row is asked for by the names that its own significance tests use (see tests/test_upstream.py).
    """

    def __init__(self, make: Callable[[Any, str], Any]) -> None:
        self.make = make

    def counts(self, rows: Sequence[Row]) -> Counts | None:
        """Of the rows that have an answer and a reference; None where none has."""
        pairs = [(r["prediction"], r["reference"]) for r in rows if r.get("prediction") is not None]
        pairs = [(prediction, reference) for prediction, reference in pairs if reference is not None]
        if not pairs:
            return None
        from sacrebleu import metrics as package

        predictions, references = map(list, zip(*pairs, strict=True))
        metric = self.make(package, tokenizer_of(references))
        return Counts(metric, np.asarray(metric._extract_corpus_statistics(predictions, [references]), float))

    def whole(self, rows: Sequence[Row]) -> Whole | None:
        found = self.counts(rows)
        if found is None:
            return None
        interval = middle([found.score(sums) for sums in drawn_sums(found.rows)], len(found.rows))
        return Whole(found.score(found.rows.sum(0)), list(interval), f"sacrebleu {found.metric.get_signature()}")

    def against(self, a: Sequence[Row], b: Sequence[Row]) -> dict[str, Any]:
        """As `statistics.paired`: the figure of all rows of b minus that of a, the interval over the same drawn rows of
        both. A row is a win where its own figure is the higher one."""
        both = [(x, y) for x, y in zip(a, b, strict=True) if all(r.get("prediction") is not None for r in (x, y))]
        before, after = (self.counts([pair[side] for pair in both]) for side in (0, 1))
        if before is None or after is None:
            return paired([], [])
        n = len(before.rows)
        drawn = zip(drawn_sums(before.rows), drawn_sums(after.rows), strict=True)
        interval = middle([after.score(y) - before.score(x) for x, y in drawn], n)
        single = paired([before.score(row) for row in before.rows], [after.score(row) for row in after.rows])
        difference = after.score(after.rows.sum(0)) - before.score(before.rows.sum(0))
        return {**single, "difference": difference, "ci": list(interval)}


def tokenizer_of(references: Sequence[str]) -> str:
    """zh where most references hold Chinese, else 13a, sacrebleu's own choice."""
    return "zh" if 2 * sum(CHINESE.search(text) is not None for text in references) > len(references) else "13a"


bleu = Corpus(lambda package, tokenizer: package.BLEU(tokenize=tokenizer))
chrf = Corpus(lambda package, _: package.CHRF())
