"""Preference pairs and labelled answers as token ids.

Masks are 1 on the tokens of the answer that a model writes, its end of turn included, 0 on the prompt, headers and
tool output. The pass over the data is the audit's: identical answers, also after truncation, are its business.
"""

from __future__ import annotations

from typing import Any

from finetune.data.audit import Audit, Encoding
from finetune.data.encoder import Encoder, scored_ids
from finetune.data.rows import Rows, divided, gathered
from finetune.data.samples import Item
from finetune.data.types import Encoded, Unpaired
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig


def load_pairs(
    config: DataConfig, encoder: Encoder, *, seed: int = 42, eval_data: Any = None, to_score: bool = False
) -> Rows:
    """Pairs of `data.train`, split by `data.eval_split`. UserError with every problem of every row.

    to_score: as a reward model reads them, up to where each answer is scored.
    """
    if to_score:  # the score stands at the end of the answer, whatever else could carry loss
        config = config.model_copy(update={"train_on": "last"})

    def row(item: Item, encoded: Encoding) -> dict[str, list[int]]:
        assert isinstance(encoded, dict)
        out = {}
        for name, answer in encoded.items():
            ids = scored_ids(answer, encoder.separator) if to_score else answer.input_ids
            out[f"{name}_ids"], out[f"{name}_mask"] = ids, answer.mask[: len(ids)]
        return out

    return _load(Audit(config, encoder, "preference", eval_data), seed, row)


def load_unpaired(config: DataConfig, encoder: Encoder, *, seed: int = 42, eval_data: Any = None) -> Rows:
    """Labelled answers; pairs are read as one good and one bad answer. UserError with every problem of every row."""

    def row(item: Item, encoded: Encoding) -> dict[str, Any]:
        assert isinstance(encoded, Encoded)
        assert isinstance(item.sample, Unpaired)
        start, ids = encoded.mask.index(1), encoded.input_ids
        return {"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": item.sample.label}

    data = _load(Audit(config, encoder, "unpaired", eval_data), seed, row)
    labels = set(data.train["label"])
    if len(labels) < 2:
        what = f"every answer is labelled {'good' if labels.pop() else 'bad'}"
        raise UserError(what, key="data.train", fix="KTO needs good and bad answers")
    return data


def _load(audit: Audit, seed: int, row: Any) -> Rows:
    import datasets

    rows, hashes, weights, places = gathered(audit, seed, row)
    pick = lambda numbers: datasets.Dataset.from_list([rows[i] for i in numbers])  # noqa: E731
    counts, said, seen = dict(audit.counts), audit.warnings(), audit.seen()
    return divided(pick, hashes, weights, audit.config.eval_split, counts, said, places, seen)
