"""How many rows of an evaluation a run was trained on."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from finetune.data import leakage, sources, text
from finetune.data.audit import BATCH, batched
from finetune.data.conversations import held_out
from finetune.data.samples import content_hash, prompt_text, questions, read_samples, specs
from finetune.data.types import Sample
from finetune.errors import UserError


def trained_on(data: Any, rows: Sequence[Sample], seed: int = 42, apart: Collection[int] | None = None) -> int | None:
    """How many of `rows` stand in the training rows of a run's data section: with the same prompt, nearly the same, or
    the same question under another system turn. None where that data cannot be read here (gone, remote, endless).

    Args:
        apart: the content hashes of what data.eval_split holds out, where they are known; else they are found here.
    """
    listed = [] if text.is_endless(data) else specs(data)
    if not listed or any(sources.is_hub(spec) or spec.get("source") == "modelscope" for spec in listed):
        return None
    prompts, asked = [prompt_text(row) for row in rows], [questions(row) for row in rows]
    index = leakage.Index(prompts, asked)
    hashes, matches = array("Q"), []  # of every training row; (its number, evaluated row)
    try:
        items = (item for spec in listed for item in read_samples(spec, data, None, seed=seed))
        for batch in batched((item for item in items if item.sample is not None), BATCH):
            start = len(hashes)
            hashes.extend([content_hash(item.sample) for item in batch])
            found = {row: match for row, match, _ in index.search([prompt_text(item.sample) for item in batch])}
            for row, item in enumerate(batch):
                match = found.get(row, index.questions.get(questions(item.sample)))
                if match is not None:
                    matches.append((start + row, match))
    except UserError:
        return None
    if apart is None:
        held = held_out(np.asarray(hashes, np.uint64), getattr(data, "eval_split", None))
    else:
        held = np.asarray([mark in apart for mark in hashes], bool)
    known = {match for row, match in matches if not held[row]}
    same = {leakage.folded(prompts[row]) for row in known}, {asked[row] for row in known} - {""}
    return sum(leakage.folded(p) in same[0] or a in same[1] for p, a in zip(prompts, asked, strict=True))
