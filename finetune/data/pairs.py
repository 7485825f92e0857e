"""Preference pairs and labelled answers as token ids.

    load_pairs(config, encoder)      rows: chosen_ids, chosen_mask, rejected_ids, rejected_mask
    load_unpaired(config, encoder)   rows: prompt_ids, completion_ids, label

Masks are 1 on the tokens of the answer that a model writes, its end of turn included, 0 on the prompt, headers and
tool output. The pass over the data is the audit's: identical answers, also after truncation, are its business.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.data.audit import Audit
from finetune.data.chat import IGNORED, Encoded, scored_ids
from finetune.data.conversations import SftData, held_out, times_used, uneven
from finetune.data.samples import content_hash, watched
from finetune.data.types import Unpaired
from finetune.errors import UserError


def load_pairs(config: Any, encoder: Any, *, seed: int = 42, eval_data: Any = None, to_score: bool = False) -> SftData:
    """Pairs of `data.train`, split by `data.eval_split`. UserError with every problem of every row.

    to_score: as a reward model reads them, up to where each answer is scored.
    """
    if to_score:  # the score stands at the end of the answer, whatever else could carry loss
        config = config.model_copy(update={"train_on": "last"})
    rows, hashes, weights, audit = [], [], [], Audit(config, encoder, "preference", eval_data)
    for item, encoded in watched(audit.rows(seed), config):
        assert isinstance(encoded, dict)
        row: dict[str, list[int]] = {}
        for name in ("chosen", "rejected"):
            found = encoded[name]
            ids = scored_ids(found, encoder.separator) if to_score else found.input_ids
            row[f"{name}_ids"], row[f"{name}_mask"] = ids, mask(found)[: len(ids)]
        rows.append(row)
        hashes.append(content_hash(item.sample))  # type: ignore[arg-type]
        weights.append(item.weight)
    audit.settle()
    return _split(rows, hashes, weights, config, audit)


def load_unpaired(config: Any, encoder: Any, *, seed: int = 42, eval_data: Any = None) -> SftData:
    """Labelled answers; pairs are read as one good and one bad answer. UserError with every problem of every row."""
    rows, hashes, weights, audit = [], [], [], Audit(config, encoder, "unpaired", eval_data)
    for item, encoded in watched(audit.rows(seed), config):
        assert isinstance(encoded, Encoded)
        assert isinstance(item.sample, Unpaired)
        start = mask(encoded).index(1)
        ids = encoded.input_ids
        rows.append({"prompt_ids": ids[:start], "completion_ids": ids[start:], "label": item.sample.label})
        hashes.append(content_hash(item.sample))
        weights.append(item.weight)
    audit.settle()
    data = _split(rows, hashes, weights, config, audit)
    if len(set(data.train["label"])) < 2:
        good = "good" if data.train[0]["label"] else "bad"
        raise UserError(f"every answer is labelled {good}", key="data.train", fix="KTO needs good and bad answers")
    return data


def mask(encoded: Encoded) -> list[int]:
    """1 where a token is trained."""
    return [int(label != IGNORED) for label in encoded.labels]


def _split(rows: list[dict[str, Any]], hashes: list[int], weights: list[float], config: Any, audit: Audit) -> SftData:
    """Rows held out by content; the others as often as the weight of their source says."""
    import datasets

    marks = np.asarray(hashes, np.uint64)
    held, times = held_out(marks, config.eval_split), times_used(marks, np.asarray(weights))
    times[held] = 0
    if not times.any():
        raise UserError("no row is left to train on", key="data.train", fix="give more rows, or hold out fewer")
    used = [rows[i] for i in np.repeat(np.arange(len(rows)), times)]
    kept = [rows[i] for i in np.flatnonzero(held)]
    train, test = (datasets.Dataset.from_list(part) if part else None for part in (used, kept))
    warnings = [*audit.warnings(), *uneven(held, config.eval_split)]
    return SftData(train, test, {**dict(audit.counts), "eval_rows": int(held.sum())}, warnings)
