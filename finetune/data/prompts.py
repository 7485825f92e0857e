"""Prompts for reinforcement learning: rows of any chat format, answered or not.

load_prompts(config, encoder)       what the policy is asked, encoded, with the row's columns for rules
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.audit import Audit
from finetune.data.conversations import times_used
from finetune.data.samples import content_hash, watched
from finetune.data.shown import told
from finetune.data.types import Conversation, Message, Preference, RowProblem, Text, Unpaired, attempted
from finetune.errors import UserError


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    """Ends where the answer begins."""
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]
    """The row as it stands in the file, and `reference`: the answer it holds, or None."""

    @property
    def text(self) -> str:
        """What was asked last."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] != "assistant"), "")


@dataclass(frozen=True)
class Prompts:
    rows: list[Prompt]
    counts: dict[str, int]
    warnings: list[str]


def load_prompts(config: Any, encoder: Any, *, seed: int = 42, eval_data: Any = None) -> Prompts:
    """Every prompt of `data.train` of at most `data.max_length` tokens; longer ones are left out and counted, or errors
    (`on_overlong`).

    UserError with every problem of every row.
    """
    audit = Audit(config, None, "prompts", eval_data)
    rows, marks, too_long = [], [], 0
    for item, _ in watched(audit.rows(seed), config):
        sample = item.sample
        if isinstance(sample, Text):
            raise UserError(
                "raw text asks nothing", path=item.file, key="data.train", fix="give rows with a prompt or messages"
            )
        assert sample is not None
        messages, reference = split(sample)
        if (forged := encoder.forged_markers(messages)) and config.on_forged_marker == "error":
            turn, marker = forged[0]
            what = f"turn {turn}: {marker!r} is a turn marker of this model, and plain text to its tokenizer"
            fix = "remove it, or set data.on_forged_marker: allow"
            audit.refuse(item, RowProblem("forged_marker", what, fix))
            continue
        audit.counts["forged_markers"] += len(forged)
        ids = attempted(encoder.prompt_ids, messages, sample.tools)
        if not isinstance(ids, RowProblem) and len(ids) > config.max_length:
            if config.on_overlong != "error":
                too_long += 1
                continue
            what = f"the prompt has {len(ids)} tokens, over data.max_length {config.max_length}"
            ids = RowProblem("overlong", what, "raise data.max_length, or set data.on_overlong: drop")
        if isinstance(ids, RowProblem):
            audit.refuse(item, ids)
            continue
        audit.left_out(item, [what for what, _ in told(encoder.losses.of(messages, sample.tools), set())])
        rows.append(Prompt(ids, messages, sample.tools, {**item.data, "reference": reference}))
        marks.append((content_hash(sample), item.weight))
    audit.settle()
    if marks:  # the weight of a source
        hashes, weights = zip(*marks, strict=True)
        times = times_used(np.asarray(hashes, np.uint64), np.asarray(weights))
        rows = [rows[i] for i in np.repeat(np.arange(len(rows)), times)]
    if not rows:
        raise UserError("no prompt is left", key="data.max_length", fix=f"raise it: {too_long} are longer")
    warnings = audit.warnings()
    if too_long:
        warnings.append(f"{too_long} prompts are longer than data.max_length ({config.max_length}) and left out")
    return Prompts(rows, {**dict(audit.counts), "overlong": too_long, "trained_tokens": 0}, warnings)


def split(sample: Conversation | Preference | Unpaired) -> tuple[list[Message], str | None]:
    """(what is asked, the good answer if there is one)."""
    if isinstance(sample, Preference):
        return sample.prompt, str(sample.chosen[-1].get("content") or "")
    if isinstance(sample, Unpaired):
        return sample.prompt, str(sample.completion[-1].get("content") or "") if sample.label else None
    messages = list(sample.messages)
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1].get("content") or "")
    return messages, None
