"""One function per kind of held-out rows; each returns an Evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from finetune.data import text as raw
from finetune.data.encoder import Encoder, cut
from finetune.data.held_out import HeldRow
from finetune.data.types import IGNORED, Encoded
from finetune.errors import UserError
from finetune.evaluation.generation import GREEDY, Evaluation, Settings, evaluate
from finetune.evaluation.kept import Answers
from finetune.evaluation.likelihood import Likelihood, negative_log_likelihoods, per_token
from finetune.evaluation.rewards import RewardModel, score_rows, scored_reply
from finetune.metrics import Metric, measure
from finetune.terminal.progress import task

T = TypeVar("T")
Scored = list[Likelihood]
Reference = tuple[Callable[[], AbstractContextManager[Any]], float]
"""The model that an objective keeps near, and its beta."""


def answers(
    name: str, model: Any, encoder: Encoder, rows: Sequence[HeldRow], max_new_tokens: int, batch_size: int,
    how: Settings = GREEDY, which: Sequence[Metric] | None = None, kept: Answers | None = None,
) -> Evaluation:  # fmt: skip
    """The metrics of answers, and of the references' losses: see `evaluation.evaluate`."""
    samples = [row.sample for row in rows]
    known = [{"place": i, "file": r.file, "row": r.row, "columns": r.columns} for i, r in enumerate(rows)]
    limits = (max_new_tokens, batch_size)
    with task(f"{name}: answering", len(rows)) as advance:
        return evaluate(name, model, encoder, samples, *limits, advance, how, which, known, kept)


def with_references(rows: Sequence[HeldRow]) -> list[dict[str, Any]]:
    """Rows of which the reference stands as the answer, to look whether a metric is of them."""
    found = []
    for row in rows:
        text = row.sample.reference
        value = None if text is None else 0.0
        place = {"file": row.file, "row": row.row, "columns": row.columns}
        loss = {"loss": value, "loss_tokens": 1, "token_accuracy": value}
        found.append({**place, **loss, "reference": text, "prediction": text or ""})
    return found


def pairs(
    name: str, model: Any, encoder: Encoder, rows: Sequence[HeldRow], batch_size: int, max_length: int | None,
    train_on: str = "assistant", reference: Reference | None = None, which: Sequence[Metric] | None = None,
) -> Evaluation:  # fmt: skip
    """In how many pairs the chosen answer has the higher summed log-probability, and by how many nats on average; loss
    and perplexity of the chosen answers.

    With a reference also the same of the rewards, beta * log(probability / the reference's): reward_accuracy and
    reward_margin.
    """
    encoded, notes = _encoded(encoder, rows, train_on, max_length)
    kept = [i for i, pair in enumerate(encoded) if all(map(_trained, pair.values())) and _differ(pair)]
    notes += _left_out(rows, kept, max_length, NO_PAIR)
    sides = [encoded[i][side] for side in ("chosen", "rejected") for i in kept]
    pad = encoder.tokenizer.pad_token_id
    chosen, rejected = _halves(_score(f"{name}: log-probabilities", model, sides, pad, batch_size))
    margins = _margins(chosen, rejected)
    found = [
        {
            **_row(rows, i), "chosen": rows[i].sample.chosen, "rejected": rows[i].sample.rejected,
            "correct": float(margin > 0), "margin": margin, **per_token(scored), "group": rows[i].group,
        }
        for i, margin, scored in zip(kept, margins, chosen, strict=True)
    ]  # fmt: skip
    if reference is not None:
        make, beta = reference
        with make() as other:
            before = _halves(_score(f"{name}: the reference's log-probabilities", other, sides, pad, batch_size))
        for row, now, then in zip(found, margins, _margins(*before), strict=True):
            row["reward_margin"] = beta * (now - then)
    return Evaluation(name, len(kept), measure("pairs", found, which), found, "pairs", notes=notes)


def unpaired(
    name: str, model: Any, encoder: Encoder, rows: Sequence[HeldRow], batch_size: int, max_length: int | None,
    reference: Reference | None = None, which: Sequence[Metric] | None = None,
) -> Evaluation:  # fmt: skip
    """Loss and perplexity of the desirable answers, the loss of the others, and what lies between them.

    With a reference, the rewards beta * log(probability / the reference's): reward_accuracy, the share of answers that
    moved to the right side (desirable ones more probable, the others less), and reward_margin, the difference of the
    two means.
    """
    encoded, notes = _encoded(encoder, rows, "assistant", max_length)
    kept = [i for i, parts in enumerate(encoded) if all(map(_trained, parts.values()))]
    notes += _left_out(rows, kept, max_length, ("no answer begins", "raise it"))
    sides, pad = [encoded[i][""] for i in kept], encoder.tokenizer.pad_token_id
    scored = _score(f"{name}: log-probabilities", model, sides, pad, batch_size)
    found: list[dict[str, Any]] = [
        {
            **_row(rows, i), "completion": rows[i].sample.completion, "label": rows[i].sample.label,
            "correct": None, **per_token(loss), "answer_reward": None, "group": rows[i].group,
        }
        for i, loss in zip(kept, scored, strict=True)
    ]  # fmt: skip
    if reference is not None:
        make, beta = reference
        with make() as other:
            before = _score(f"{name}: the reference's log-probabilities", other, sides, pad, batch_size)
        for row, now, then in zip(found, scored, before, strict=True):
            row["answer_reward"] = reward = beta * (then.total - now.total)
            row["correct"] = float(reward > 0 if row["label"] else reward < 0)
    counts = {name: sum(row["label"] is label for row in found) for name, label in (("good", True), ("bad", False))}
    return Evaluation(name, len(kept), counts | measure("unpaired", found, which), found, "unpaired", notes=notes)


def text(
    name: str, model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int, length: int, blocks: int | None,
    whole: bool, which: Sequence[Metric] | None = None,
) -> Evaluation:  # fmt: skip
    """Loss and perplexity per token, in blocks of `length` tokens as in training.

    Args:
        blocks: only so many; whole: what does not fill the last block is left out, as in training.
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    packed = raw.pack(texts, encode, length, raw.separator(tokenizer), rest=not whole)
    found = [Encoded(ids, list(ids)) for ids in islice(packed, blocks)]
    if not found:
        what, fix = f"the text does not fill one block of {length} tokens", f"set it below {length}, or give more text"
        raise UserError(what, key="data.max_length", fix=fix)
    scored = _score(f"{name}: loss", model, found, tokenizer.pad_token_id, batch_size, "blocks")
    rows = [
        {"row": i, "text": tokenizer.decode(block.input_ids), "tokens": loss.tokens, "correct": None, **per_token(loss)}
        for i, (block, loss) in enumerate(zip(found, scored, strict=True), 1)
    ]
    values = measure("text", rows, which) | {"tokens": sum(loss.tokens for loss in scored)}
    return Evaluation(name, len(found), values, rows, "text")


def scores(
    name: str, model: RewardModel, rows: Sequence[HeldRow], max_length: int | None,
    which: Sequence[Metric] | None = None,
) -> Evaluation:  # fmt: skip
    """How often a reward model scores the chosen answer higher, for all pairs and each group of them, and by how much
    on average."""
    assert model.encoder is not None, "a run of ft reward has a causal base"
    encoder = model.encoder

    def ids(row: HeldRow) -> list[list[int]]:
        both = row.sample.conversations()
        return [scored_reply(encoder, both[side], max_length) for side in ("chosen", "rejected")]

    read = [ids(row) for row in rows]
    kept = [i for i, (chosen, rejected) in enumerate(read) if chosen != rejected]
    notes = _left_out(rows, kept, max_length, NO_PAIR)
    sides = [read[i][side] for side in (0, 1) for i in kept]
    with task(f"{name}: scoring", len(sides), "answers") as advance:
        found = score_rows(model.model, sides, model.tokenizer.pad_token_id, on_batch=advance)
    result = [
        {
            **_row(rows, i), "chosen": rows[i].sample.chosen, "rejected": rows[i].sample.rejected,
            "correct": float(chosen > rejected), "loss": None, "margin": chosen - rejected, "chosen_score": chosen,
            "rejected_score": rejected, "group": rows[i].group,
        }
        for i, chosen, rejected in zip(kept, *_halves(found), strict=True)
    ]  # fmt: skip
    return Evaluation(name, len(kept), measure("pairs", result, which), result, "pairs", notes=notes)


def _row(rows: Sequence[HeldRow], i: int) -> dict[str, Any]:
    """Which row it is, and what was asked in it."""
    return {"place": i, "file": rows[i].file, "row": rows[i].row, "messages": rows[i].sample.prompt}


def _encoded(
    encoder: Encoder, rows: Sequence[HeldRow], train_on: str, limit: int | None
) -> tuple[list[dict[str, Encoded]], list[str]]:
    """(the answers of each row by name, cut to `limit` tokens; what is to be said of that)"""
    found, cuts = [], 0
    for row in rows:
        parts = {name: encoder.encode(part, train_on) for name, part in row.sample.conversations().items()}
        short = {name: cut(encoder.tokenizer, part, limit) for name, part in parts.items()}
        cuts += sum(short[name] is not parts[name] for name in parts)
        found.append(short)
    return found, [f"{cuts} answers are cut to data.max_length {limit}"] if cuts else []


def _trained(row: Encoded) -> bool:
    return any(label != IGNORED for label in row.labels[1:])


def _differ(pair: dict[str, Encoded]) -> bool:
    return pair["chosen"].input_ids != pair["rejected"].input_ids


def _score(what: str, model: Any, rows: Sequence[Encoded], pad: int, batch_size: int, unit: str = "answers") -> Scored:
    with task(what, len(rows), unit) as advance:
        return negative_log_likelihoods(model, [(row.input_ids, row.labels) for row in rows], pad, batch_size, advance)


def _halves(scored: list[T]) -> tuple[list[T], list[T]]:
    return scored[: len(scored) // 2], scored[len(scored) // 2 :]


def _margins(chosen: Scored, rejected: Scored) -> list[float]:
    """By how many nats the chosen answer is the more probable one."""
    return [b.total - a.total for a, b in zip(chosen, rejected, strict=True)]


NO_PAIR = ("no pair differs", "raise it, or give others")


def _left_out(rows: Sequence[HeldRow], kept: list[int], limit: int | None, none: tuple[str, str]) -> list[str]:
    """What is to be said of the rows that are not kept. UserError, of the message and the fix `none`, if none is."""
    if not kept:
        raise UserError(f"{none[0]} within data.max_length {limit}", path=rows[0].file, fix=none[1])
    count = len(rows) - len(kept)
    return [f"{count} rows are left out: nothing to compare within data.max_length {limit}"] if count else []
