"""What `ft eval` and `ft compare` measure on, and how much of it a run was trained on."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.data import checks, choices, formats, leakage, sources
from finetune.data import text as raw
from finetune.data.audit import BATCH, Audit, batched
from finetune.data.encoder import Encoder
from finetune.data.report import Noted
from finetune.data.rows import eval_mask
from finetune.data.samples import Item, held_out_section, read_samples, specs, watched
from finetune.data.types import Conversation, Preference, RowProblem, Sample, Text, Unpaired
from finetune.errors import Problem, UserError
from finetune.recipe.sections import DataConfig
from finetune.recipe.stages import ROWS, Recipe
from finetune.terminal.progress import note, warn

KINDS: dict[type[Sample], str] = {
    Conversation: "answers", Preference: "pairs", Unpaired: "unpaired", Text: "text",
    choices.Choice: "choices",
}  # fmt: skip
SPLIT = "data.eval_split"


class HeldRow(NamedTuple):
    """A row to evaluate on, with its place."""

    file: str
    row: int
    sample: Any  # a Sample
    group: str | None = None  # what its column `group` says
    columns: Mapping[str, Any] = {}
    shots: Sequence[Conversation] = ()  # examples before it: see `evaluation.shots`


@dataclass(frozen=True)
class HeldOut:
    name: str
    """The file, or data.eval_split."""
    rows: list[HeldRow]
    hashes: frozenset[int] | None = None
    """Of all rows that data.eval_split holds out."""
    blocks: int | None = None
    """Of text: only so many of the blocks that it fills."""
    shots: Mapping[str, list[choices.Choice]] = field(default_factory=dict)
    """Of multiple choice: each subject's questions of its dev file, in their order."""
    others: list[Any] | None = None
    """All samples of the file, where `rows` are only the first of them."""

    @property
    def kind(self) -> str:
        """answers, pairs, unpaired, text or choices"""
        return KINDS[type(self.rows[0].sample)]

    @property
    def samples(self) -> list[Any]:
        return [row.sample for row in self.rows]


# --- a file's rows ---


def rows_of(path: str, config: DataConfig, limit: int | None) -> HeldOut:
    """The rows of a file; of a dataset folder those of its validation or test split, which is said."""
    if choices.is_choices(path):
        return questions_of(path, limit)
    if split := sources.held_out(path).get("split"):
        note(f"{path}: its {split} split")
    rows = load_held_out(path, config)
    if limit is None or limit >= len(rows):
        return HeldOut(path, rows)
    return HeldOut(path, rows[:limit], others=[row.sample for row in rows])


def questions_of(path: str, limit: int | None) -> HeldOut:
    """Multiple choice: the rows of each subject's file (the first `limit` of each), and those of the dev files."""
    files = choices.evaluated(path)
    rows: list[HeldRow] = []
    shots: dict[str, list[choices.Choice]] = {}
    problems: list[Problem] = []
    for one in files:
        dev = choices.dev_file(one)
        try:
            found = choices.read(one.path)[:limit]
            rows += [HeldRow(q.file, q.row, q.sample, one.subject, q.columns) for q in found]
            shots[one.subject] = [] if dev is None else [question.sample for question in choices.read(dev)]
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if split := Path(path).expanduser().is_dir() and files[0].split:
        note(f"{path}: its {split} split, {len(files)} {'subject' if len(files) == 1 else 'subjects'}")
    return HeldOut(path, rows, shots=shots)


def load_eval_rows(spec: Any, config: DataConfig | None = None) -> list[Conversation]:
    """Conversations for generation; as `load_held_out`."""
    return [row.sample for row in load_held_out(spec, config, "sft")]


def load_held_out(spec: Any, config: DataConfig | None = None, kind: str | None = None) -> list[HeldRow]:
    """The rows of a file to evaluate on, of the kind that they are (or of `kind` alone), all of one kind. Conversations
    with only a prompt are fine. UserError with every unusable row."""
    rows: list[HeldRow] = []
    errors: list[Problem] = []
    section = held_out_section(spec, config)
    for source in specs(section):
        for item in read_samples(source, section, kind):
            if item.problem is not None and item.problem.kind == "empty_file":
                warn(f"{item.file}: {item.problem.message}")
                continue
            found = what_is_wrong(item)
            errors += [Noted("error", item.file, item.row, finding).as_problem() for finding in found]
            if not found:
                rows.append(held_row(item, source.get("columns") or section.columns))
    if errors:
        raise UserError(errors)
    if not rows:
        raise UserError("no rows", path=str(spec), fix="name a file with rows")
    other = next((row for row in rows if type(row.sample) is not type(rows[0].sample)), None)
    if other is not None:
        what = f"row {other.row} is of another kind than {rows[0].file}, row {rows[0].row}"
        raise UserError(what, path=other.file, fix="evaluate them one after the other")
    return rows


def what_is_wrong(item: Item) -> Sequence[checks.Finding | RowProblem]:
    if item.problem is not None:
        return [item.problem]
    found = checks.check(item.usable, item.usable.whole_text)
    return [finding for finding in found if finding.level == "error" and finding.kind != "no_answer"]


def held_row(item: Item, columns: dict[str, str] | None) -> HeldRow:
    group = formats.shaped(item.data, columns).get("group")
    named = str(group) if isinstance(group, str | int | float) and group != "" else None  # a list names no group
    sample = replace(item.sample, group=named) if isinstance(item.sample, Conversation) else item.sample
    return HeldRow(item.file, item.row, sample, named, item.data)


# --- what data.eval_split holds out ---

MANY = 50_000


def split_off(recipe: Recipe, encoder: Encoder | None, limit: int | None) -> HeldOut:
    """The rows that training leaves out by `data.eval_split`. UserError when there are none.

    encoder: that of the run; rows that it cannot encode, or that max_length leaves out, are held out nowhere. None for
    raw text.
    """
    data, seed = recipe.data, recipe.train.seed
    if recipe.stage == "pretrain":
        found = texts_split_off(data, seed)
        return replace(found, rows=found.rows[:limit])
    if recipe.stage == "reward":  # as its rows are read to be scored
        data = data.model_copy(update={"train_on": "last"})
    audit = Audit(data, encoder, ROWS[recipe.stage])
    kept: list[tuple[int, Item]] = []
    for item, _ in watched(audit.rows(seed), data, "reading"):
        kept.append((item.usable.content_hash, item))
        if len(kept) >= 2 * MANY:  # what is not held out of these is not held out of more
            kept = lowest(kept, data.eval_split)
    audit.settle()
    kept = lowest(kept, data.eval_split)
    if not kept:
        raise UserError("no row was held out", key=SPLIT, fix="give --data FILE")
    rows = [held_row(item, data.columns) for _, item in kept]
    return HeldOut(SPLIT, rows[:limit], frozenset(mark for mark, _ in kept))


def lowest(marked: Sequence[tuple[int, Item]], share: float | int | None) -> list[tuple[int, Item]]:
    held = eval_mask(np.asarray([mark for mark, _ in marked], np.uint64), share)
    return [pair for pair, kept in zip(marked, held, strict=True) if kept]


def texts_split_off(data: DataConfig, seed: int) -> HeldOut:
    if raw.is_endless(data):
        blocks = int(data.eval_split or 0)
        texts = islice(raw.documents(data, seed + raw.EVAL_SEED, 1), blocks * data.max_length)
        return HeldOut(SPLIT, [HeldRow(raw.WORLD, i, Text(t)) for i, t in enumerate(texts, 1)], blocks=blocks)
    audit = Audit(data, None, "text")
    kept, others = raw.split(raw.documents(data, seed, 1, audit), data.eval_split)
    for _ in others:
        pass
    audit.settle()
    rows = [HeldRow(str(data.train), i, Text(text)) for i, text in enumerate(kept, 1)]
    return HeldOut(SPLIT, rows, frozenset(row.sample.content_hash for row in rows))


def held_hashes(config: DataConfig, seed: int) -> frozenset[int]:
    """Content hashes of what data.eval_split holds out, of the rows as they stand: those that training leaves out for
    another reason count, too. seed: train.seed."""
    if config.eval_split is None:
        return frozenset()
    items = (item for spec in specs(config) for item in read_samples(spec, config, None, seed=seed))
    every = np.fromiter((item.usable.content_hash for item in items if item.sample is not None), np.uint64)
    return frozenset(every[eval_mask(every, config.eval_split)].tolist())


# --- what a run was trained on ---


class Leak(NamedTuple):
    """What of a run's training rows is most like an evaluated row."""

    similarity: float
    """Of the prompts: 1 is the same up to case and spacing, 0 the same question under another system turn."""
    file: str
    row: int


def leaks(
    config: DataConfig, rows: Sequence[Sample], seed: int, apart: Collection[int] | None = None
) -> list[Leak | None] | None:
    """For each of `rows` whether it stands in the training rows of a run's data section: with the same prompt, with
    nearly the same, or with the same question under another system turn. None where that data cannot be read here
    (gone, remote, endless).

    Args:
        seed: train.seed, by which data.max_samples rows were drawn. apart: the content hashes of what data.eval_split
            holds out, where they are known; else they are found here.
    """
    listed = specs(config)
    if raw.is_endless(config) or any(map(sources.is_remote, listed)):
        return None
    index = leakage.Index([row.prompt_text for row in rows], [row.questions for row in rows])
    hashes = array("Q")  # of every training row
    found: list[tuple[int, int, Leak]] = []  # (its number, evaluated row, what it is)
    try:
        items = (item for spec in listed for item in read_samples(spec, config, None, seed=seed))
        for batch in batched((item for item in items if item.sample is not None), BATCH):
            samples = [item.usable for item in batch]
            for row, match, share in index.every(samples):
                found.append((len(hashes) + row, match, Leak(share, batch[row].file, batch[row].row)))
            hashes.extend([sample.content_hash for sample in samples])
    except UserError:
        return None
    if apart is None:
        held = eval_mask(np.asarray(hashes, np.uint64), config.eval_split)
    else:
        held = np.asarray([mark in apart for mark in hashes], bool)
    best: dict[int, Leak] = {}
    for number, match, leak in found:
        if not held[number] and (match not in best or best[match].similarity < leak.similarity):
            best[match] = leak
    prompts = {leakage.folded(rows[i].prompt_text): leak for i, leak in best.items() if leak.similarity}
    questions = {rows[i].questions: leak._replace(similarity=0.0) for i, leak in best.items()}
    questions.pop("", None)
    return [
        best.get(i) or prompts.get(leakage.folded(row.prompt_text)) or questions.get(row.questions)
        for i, row in enumerate(rows)
    ]


EXAMPLES = 3


def leakage_figures(rows: Sequence[tuple[HeldRow, Leak | None]]) -> dict[str, Any]:
    """`trained_on`, how many of these rows stand in a run's training data, and `leakage`: how, and where the first."""
    known = [(row, leak) for row, leak in rows if leak is not None]
    kinds = {
        "exact": sum(leak.similarity == 1 for _, leak in known),
        "near": sum(0 < leak.similarity < 1 for _, leak in known),
        "question": sum(leak.similarity == 0 for _, leak in known),
    }
    examples = [
        {"file": one.file, "row": one.row, "train_file": at.file, "train_row": at.row, "similarity": at.similarity}
        for one, at in known[:EXAMPLES]
    ]
    return {
        "trained_on": len(known),
        "leakage": {"n": len(rows), "near_from": leakage.NEAR, **kinds, "examples": examples},
    }
