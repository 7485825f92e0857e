"""Multiple choice by log-likelihood: the option that the model finds most probable behind the question is its answer.

By letter the options stand in the prompt, and the letters are compared. By text they do not, and the options' texts are
compared, by log-probability per character. The prompt is the benchmark's own; for models with a chat template the same
texts are turns of a conversation, the shots as earlier turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch

from finetune.data.choices import LETTERS, Choice
from finetune.data.encoder import Encoder
from finetune.data.held_out import HeldOut, HeldRow
from finetune.data.types import IGNORED, Conversation
from finetune.errors import UserError
from finetune.evaluation.generation import WINDOW, Evaluation, windows
from finetune.evaluation.likelihood import ROOM, by_length, right_pad, room_of, takes
from finetune.metrics import Metric, measure
from finetune.models.hardware import input_device
from finetune.terminal.progress import task

SHOTS = 5  # as the benchmarks are published
Ids = list[int]
Asked = tuple[Ids, list[Ids]]
"""(ids before the options part, the rest of each option)"""


class Layout(NamedTuple):
    """How a benchmark asks."""

    intro: str
    open_intro: str
    """The same where options are not listed."""
    question: str
    cue: str
    gap: str
    """Between cue and answer."""


LAYOUTS = {
    "ceval": Layout(
        "以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n",
        "以下是中国关于{subject}考试的问题，请给出正确答案。\n\n", "{text}", "答案：", "",
    ),
    "cmmlu": Layout(
        "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n",
        "以下是关于{subject}的问题，请直接给出正确答案。\n\n", "题目：{text}", "答案是：", "",
    ),
    "mmlu": Layout(
        "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "The following are questions (with answers) about {subject}.\n\n", "{text}", "Answer:", " ",
    ),
}  # fmt: skip


def block(asked: Choice, listed: bool) -> str:
    """A question up to where its answer begins."""
    layout = LAYOUTS[asked.layout]
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, asked.options, strict=False)] if listed else []
    return "\n".join([layout.question.format(text=asked.text), *options, layout.cue])


def answers(asked: Choice, listed: bool) -> list[str]:
    return [*LETTERS[: len(asked.options)]] if listed else [*asked.options]


def right_answer(shot: Choice, listed: bool) -> str:
    assert shot.answer is not None, "of dev files every row has an answer"
    return answers(shot, listed)[shot.answer]


def intro(asked: Choice, listed: bool) -> str:
    layout = LAYOUTS[asked.layout]
    return (layout.intro if listed else layout.open_intro).format(subject=asked.subject)


# --- ids ---


def as_published(tokenizer: Any, asked: Choice, shots: Sequence[Choice], listed: bool) -> Asked:
    """Each option is tokenised together with what stands before it, as the model would read it. Where that changes the
    last tokens of the prompt, for one option or several, all are compared from there on."""
    gap = LAYOUTS[asked.layout].gap
    before = "".join(f"{block(shot, listed)}{gap}{right_answer(shot, listed)}\n\n" for shot in shots)
    prompt = intro(asked, listed) + before + block(asked, listed)
    return parted(ids_of(tokenizer, prompt), [ids_of(tokenizer, f"{prompt}{gap}{a}") for a in answers(asked, listed)])


def ids_of(tokenizer: Any, text: str) -> Ids:
    """With the token that begins a text, without the one that ends it."""
    ids: Ids = tokenizer.encode(text)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def as_conversation(encoder: Encoder, asked: Choice, shots: Sequence[Choice], listed: bool) -> Asked:
    """The options in the assistant's turn, without the token that ends it."""
    turns: list[dict[str, Any]] = []
    for one in (*shots, asked):
        turns.append({"role": "user", "content": ("" if turns else intro(asked, listed)) + block(one, listed)})
        if one is not asked:
            turns.append({"role": "assistant", "content": right_answer(one, listed)})
    options = [through(encoder, turns, answer) for answer in answers(asked, listed)]
    return parted(encoder.prompt_ids(turns), options)


def through(encoder: Encoder, turns: Sequence[dict[str, Any]], answer: str) -> Ids:
    """The conversation up to the end of this answer, without the token that ends the turn."""
    encoded = encoder.encode(Conversation([*turns, {"role": "assistant", "content": answer}]), "last")
    start = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    ids, decode = encoded.input_ids, encoder.tokenizer.decode
    ends = (end for end in range(start + 1, len(ids)) if answer.strip() in decode(ids[start:end]))
    return ids[: next(ends, len(ids))]


def parted(prompt: Ids, options: Sequence[Ids]) -> Asked:
    """What all of them begin with, as far as the prompt goes, and the rest of each."""
    for end in count():
        if end == len(prompt) or any(end >= len(ids) - 1 or ids[end] != prompt[end] for ids in options):
            return [*options[0][:end]], [[*ids[end:]] for ids in options]
    raise AssertionError("unreachable")


def fitting(
    encode: Callable[[Sequence[Choice]], Asked], shots: Sequence[Choice], limit: int | None, row: HeldRow
) -> tuple[Asked, int]:
    """(ids, how many of the first shots fit into `limit` tokens). UserError where the question alone does not."""
    for number in range(len(shots), -1, -1):
        before, options = encode(shots[:number])
        if limit is None or len(before) + max(map(len, options)) <= limit:
            return (before, options), number
    what = f"the question alone has more than the {limit} tokens that the model was made for"
    raise UserError(what, path=row.file, row=row.row, fix="take it out")


# --- scores ---


@torch.inference_mode()
def log_likelihoods(
    model: Any, asked: Sequence[Asked], pad: int, batch_size: int, on_batch: Callable[[int], None] = lambda n: None
) -> list[list[float]]:
    """Summed log-probability in nats of each option of each row.

    Nobody reads what comes after an option's last token: options of one token share one pass over their prompt.
    """
    model.eval()
    device = input_device(model)
    result = [[0.0] * len(options) for _, options in asked]
    passes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, (_, options) in enumerate(asked):
        for place, ids in enumerate(options):
            passes.setdefault((row, tuple(ids[:-1])), []).append(place)
    jobs = list(passes)
    left = [0] * len(asked)
    for row, _ in jobs:
        left[row] += 1
    few = takes(model, "logits_to_keep")
    for batch in by_length(
        [len(asked[row][0]) + len(read) for row, read in jobs], batch_size, ROOM if few else room_of(model)
    ):
        lines = [[*asked[jobs[i][0]][0], *jobs[i][1]] for i in batch]
        padded, mask = right_pad(lines, pad, device)
        first = min(len(asked[jobs[i][0]][0]) for i in batch) - 1  # before it nothing is compared
        kept = padded.shape[1] - first
        more = {"logits_to_keep": kept} if few else {}
        logits = model(input_ids=padded, attention_mask=mask, use_cache=False, **more).logits[:, -kept:].float()
        for line, i in enumerate(batch):
            row, start = jobs[i][0], len(asked[jobs[i][0]][0]) - 1 - first
            found = logits[line, start : start + len(jobs[i][1]) + 1].log_softmax(-1)
            for place in passes[jobs[i]]:
                tokens = torch.tensor(asked[row][1][place], device=device)
                result[row][place] = found.gather(1, tokens[:, None]).double().sum().item()
            left[row] -= 1
            if not left[row]:
                on_batch(1)
    return result


# --- the evaluation ---


def shots_of(held: HeldOut, wanted: int | None, key: str = "eval.shots") -> int:
    """How many shots are given: as many as are wanted, unset five or as many as every subject has. UserError where a
    subject has fewer."""
    fewest = min(held.shots, key=lambda subject: len(held.shots[subject]))
    have = len(held.shots[fewest])
    if wanted is None:
        return min(SHOTS, have)
    if wanted > have:
        what = f"{fewest} has no dev file" if not have else f"the dev file of {fewest} has {have} questions"
        fix = f"lay {fewest}_dev.csv beside it or into dev/, or set fewer"
        raise UserError(f"{what}, and {wanted} shots are wanted", path=held.name, key=key, fix=fix)
    return wanted


def evaluate(
    name: str, model: Any, tokenizer: Any, encoder: Encoder | None, held: HeldOut, number: int, batch_size: int,
    limit: int | None, which: Sequence[Metric],
) -> Evaluation:  # fmt: skip
    """choice_accuracy of all questions and of each subject.

    Args:
        encoder: asks as a conversation; None as published. number: of shots. limit: most tokens of a prompt.
    """
    rows: list[dict[str, Any]] = [
        {
            "place": i, "file": row.file, "row": row.row, "messages": row.sample.turns, "columns": row.columns,
            "options": dict(zip(LETTERS, row.sample.options, strict=False)), "reference": row.sample.reference,
            "prediction": None, "correct": None, "loss": None, "group": row.group,
        }
        for i, row in enumerate(held.rows)
    ]  # fmt: skip
    fewer: set[int] = set()
    needs = {metric.needs for metric in which}
    for kind in [kind for kind in ("letter", "full") if kind in needs]:
        listed = kind == "letter"
        with task(f"{name}: {'letters' if listed else 'options'}", len(rows), "questions") as advance:
            for start in windows(rows):
                part, asked = held.rows[start : start + WINDOW], []
                for at, row in enumerate(part, start):
                    one, shots = row.sample, held.shots[str(row.group)][:number]

                    def encode(shots: Sequence[Choice], one: Choice = one, listed: bool = listed) -> Asked:
                        if encoder is None:
                            return as_published(tokenizer, one, shots, listed)
                        return as_conversation(encoder, one, shots, listed)

                    found, given = fitting(encode, shots, limit, row)
                    asked.append(found)
                    if given < len(shots):
                        fewer.add(at)
                scores = log_likelihoods(model, asked, tokenizer.pad_token_id, batch_size, advance)
                for values, row, totals in zip(rows[start : start + WINDOW], part, scores, strict=True):
                    note_scores(values, row.sample, totals, kind)
    what = f"{len(fewer)} questions are asked with fewer shots: with {number} they have over {limit} tokens"
    how = {"shots": number, "prompt": "as published" if encoder is None else "chat template"}
    return Evaluation(name, len(rows), measure("choices", rows, which), rows, "choices", how, [what] * bool(fewer))


def note_scores(values: dict[str, Any], asked: Choice, totals: Sequence[float], kind: str) -> None:
    """`letter_scores` and `letter_right` or, per character, `full_scores` and `full_right`."""
    sizes = [1] * len(totals) if kind == "letter" else [len(option) for option in asked.options]
    scores = {letter: total / size for letter, total, size in zip(LETTERS, totals, sizes, strict=False)}
    best = max(scores, key=scores.__getitem__)
    right = float(best == asked.reference)
    values |= {f"{kind}_scores": scores, f"{kind}_right": right}
    if values["prediction"] is None:
        values |= {"prediction": best, "correct": right}
