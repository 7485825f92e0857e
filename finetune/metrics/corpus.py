"""BLEU and chrF: figures of all rows together, by sacrebleu. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune.metrics.metric import Row, Whole
from finetune.metrics.statistics import drawn_sums, middle
from finetune.metrics.text import CHINESE


def sacrebleu(make: Callable[[Any, str], Any]) -> Callable[[Sequence[Row]], Whole | None]:
    """0 to 100, with a bootstrap interval over rows.

    make: of (the module sacrebleu.metrics, the tokenizer that suits the references) one of its metrics. What it counts
    in a row is asked for by the names that its own significance tests use (see tests/test_upstream.py): the score of a
    corpus is one of their sum.
    """

    def whole(rows: Sequence[Row]) -> Whole | None:
        pairs = [(r["prediction"], r["reference"]) for r in rows if r.get("prediction") is not None]
        pairs = [(prediction, reference) for prediction, reference in pairs if reference is not None]
        if not pairs:
            return None
        from sacrebleu import metrics as package

        predictions, references = map(list, zip(*pairs, strict=True))
        metric = make(package, tokenizer_of(references))
        counts = np.asarray(metric._extract_corpus_statistics(predictions, [references]), float)

        def score(sums: np.ndarray) -> float:
            return float(metric._compute_score_from_stats([int(n) for n in sums]).score)

        interval = middle([score(sums) for sums in drawn_sums(counts)])
        return Whole(score(counts.sum(0)), list(interval), f"sacrebleu {metric.get_signature()}")

    return whole


def tokenizer_of(references: Sequence[str]) -> str:
    """zh where most references hold Chinese, else 13a, sacrebleu's own choice."""
    return "zh" if 2 * sum(CHINESE.search(text) is not None for text in references) > len(references) else "13a"


bleu = sacrebleu(lambda package, tokenizer: package.BLEU(tokenize=tokenizer))
chrf = sacrebleu(lambda package, _: package.CHRF())
