"""The rows of a file or a pipe, answered window by window and written in their order.

A window is answered short prompts first; a row is written as soon as all before it are. No more than a window is in
memory. A row that cannot be asked is written with `prediction: null` and `error`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from finetune.adapters.multiple import ActiveAdapter, activated
from finetune.base import Base
from finetune.data import asking
from finetune.data.asking import STDIN, WINDOW, Converter, Prompter
from finetune.data.samples import expected_rows
from finetune.data.types import Row, RowProblem
from finetune.errors import Problem, UserError
from finetune.evaluation.generation import Settings, behind_thinking, decode, stop_ids, written
from finetune.evaluation.targets import Target
from finetune.recipe.sections import DataConfig
from finetune.run.appending import jsonable
from finetune.terminal.progress import note, task, warn

COLUMN = "prediction"
THINKING = "prediction_thinking"
"""What a thinking model thought before it, in the same shape; only in rows where there is some."""
ERRORS = ("error", "prediction_error")
"""Where it is said why there is no prediction; the second in rows that have a column `error` of their own."""
SHOWN = 5  # bad rows that are told one by one


@dataclass(frozen=True)
class Wishes:
    """What is asked of every row."""

    how: Settings
    max_new_tokens: int
    batch_size: int
    n: int = 1
    system: str | None = None
    raw: bool = False
    columns: dict[str, str] | None = None
    limit: int | None = None
    named: tuple[str, ...] = ()
    """Columns of the file that --columns names."""


@dataclass
class Writer:
    """One of the models that answer."""

    target: Target
    base: Base
    prompter: Prompter
    network: ActiveAdapter | None = None
    """Once it is loaded."""


def tell_formats(writers: Iterable[Writer]) -> None:
    """What a user should be told of the chat formats, each once."""
    for said in dict.fromkeys(writer.prompter.encoder.notice for writer in writers):
        if said is not None:
            note(said)


@dataclass
class Asked:
    """A row of a window and its answers so far."""

    number: int
    """From 0; names the random numbers of its answers."""
    row: Row
    texts: list[list[str]]
    """[models, n]"""
    thoughts: list[list[str]]
    """[models, n]; what was thought before them, mostly nothing."""
    prompts: list[list[int]] = field(default_factory=list)
    """Of each model; none where the row cannot be asked."""
    continues: bool = False
    problem: RowProblem | None = None
    left: int = 0
    """Answers that are not there yet."""

    def line(self, names: Sequence[str]) -> dict[str, Any]:
        """The row as it is written; with several models their answers by name, of several answers a list."""
        row: dict[str, Any] = jsonable(self.row.data)
        if self.problem is not None:
            return {**row, COLUMN: None, ERRORS[ERRORS[0] in row]: str(problem_of(self.row, self.problem))}
        thoughts = {THINKING: together(self.thoughts, names)} if any(map(any, self.thoughts)) else {}
        return {**row, COLUMN: together(self.texts, names), **thoughts}


def together(texts: Sequence[Sequence[str]], names: Sequence[str]) -> Any:
    """[models, n] as it is written: a text, a list of several, of several models by name."""
    each = [of[0] if len(of) == 1 else of for of in texts]
    return each[0] if len(each) == 1 else dict(zip(names, each, strict=True))


def problem_of(row: Row, problem: RowProblem) -> Problem:
    return Problem(problem.message, Path(row.file).name, row=row.row, line=problem.line, fix=problem.fix)


def answer_all(
    writers: Sequence[Writer], wishes: Wishes, rows: Iterator[tuple[int, Row]], data: str,
    load: Callable[[Sequence[Writer]], None], write: Callable[[dict[str, Any]], None], done: int = 0,
) -> None:  # fmt: skip
    """Every row with its answers; at the end it is said what could not be asked.

    Args:
        rows: with their numbers from 0. load: gives the writers their networks. done: rows that are answered already.
    """
    total = expected_rows(DataConfig(train=data)) if Path(data).expanduser().is_file() else None
    if total is not None:
        total = max(0, min(total, wishes.limit or total) - done)
    groups = asking.windows(rows, max(WINDOW, wishes.batch_size), live=data == STDIN)
    if (first := next(groups, None)) is None:
        note("no rows")
        return
    session = Session(writers, wishes, data)
    asked: list[Asked] | None = session.asked(first)  # what is wrong with all of them is said before anything is loaded
    load(writers)
    names = [writer.target.name for writer in writers]
    with task("answering", total) as advance:
        while asked is not None:
            for one in session.answered(asked):
                write(one.line(names))
                advance(1)
            asked = None if (window := next(groups, None)) is None else session.asked(window)
    session.tell()


class Session:
    def __init__(self, writers: Sequence[Writer], wishes: Wishes, data: str) -> None:
        self.writers, self.wishes, self.data = writers, wishes, data
        self.converter: Converter | None = None
        self.rows = self.answers = self.cut = 0
        self.bad: list[Problem] = []

    # --- prompts ---

    def asked(self, window: Sequence[tuple[int, Row]]) -> list[Asked]:
        """The rows with their prompts. UserError when none has a known format, or a column of ours."""
        readable = [row for _, row in window if row.problem is None]
        for row in readable:
            if taken := next((name for name in (COLUMN, THINKING) if name in row.data), None):
                raise UserError(f"has a column {taken!r} already", path=row.file, row=row.row, fix="rename it")
        if self.converter is None and readable:
            self.check_columns(readable)
            self.converter = Converter(readable, self.wishes.columns, self.data)
            self.tell_format(self.converter)
        return [self.one(number, row) for number, row in window]

    def check_columns(self, head: Sequence[Row]) -> None:
        """UserError for a column that --columns names and no row has; of a pipe there may be only the first row."""
        have = dict.fromkeys(name for row in head for name in row.data)
        for name in self.wishes.named if self.data != STDIN else ():
            if name not in have:
                fix = f"their columns: {', '.join(have)}"
                raise UserError(f"no row has a column {name!r}", path=self.data, key="--columns", fix=fix)

    def tell_format(self, converter: Converter) -> None:
        """Once it is known, what is said of it. UserError for options that do nothing with it."""
        if converter.is_text and self.wishes.system is not None:
            what = "has no effect: texts are continued as they stand"
            raise UserError(what, key="--system", fix="leave it out, or ask them: --columns prompt=text")
        if converter.is_text and not self.wishes.raw:
            note("texts are continued as they stand, without a chat template; to ask them: --columns prompt=text")
        elif not self.wishes.raw:
            tell_formats(self.writers)

    def one(self, number: int, row: Row) -> Asked:
        n = self.wishes.n
        made = Asked(number, row, [[""] * n for _ in self.writers], [[""] * n for _ in self.writers])
        self.rows += 1
        try:
            if row.problem is not None:
                raise row.problem
            assert self.converter is not None
            sample = self.converter.sample(row)
            made.prompts = [writer.prompter.ids(sample) for writer in self.writers]
            made.continues = self.writers[0].prompter.continues(sample)
            made.left = n * len(self.writers)
        except RowProblem as problem:
            made.problem = problem
            self.bad.append(problem_of(row, problem))
        return made

    # --- answers ---

    def answered(self, window: Sequence[Asked]) -> Iterator[Asked]:
        """The rows in order, each as soon as it and all before it have their answers."""
        at = 0
        for _ in chain([None], *(self.written(window, which) for which in range(len(self.writers)))):
            while at < len(window) and not window[at].left:
                yield window[at]
                at += 1

    def written(self, window: Sequence[Asked], which: int) -> Iterator[None]:
        """Fill in the answers of one model; a step for each batch."""
        writer, wishes = self.writers[which], self.wishes
        encoder, longest = writer.prompter.encoder, writer.prompter.longest
        rooms: dict[int, list[tuple[Asked, int]]] = {}
        for one in window:
            if one.prompts:
                free = wishes.max_new_tokens if longest is None else longest - len(one.prompts[which])
                room = min(wishes.max_new_tokens, free)
                rooms.setdefault(room, []).extend((one, k) for k in range(wishes.n))
        assert writer.network is not None
        for room, wanted in sorted(rooms.items(), reverse=True):
            prompts = [one.prompts[which] for one, _ in wanted]
            names = [f"{one.number}.{k}" if k else one.number for one, k in wanted]
            with activated(writer.network) as model:
                stops, pad = stop_ids(model, encoder), encoder.tokenizer.pad_token_id
                for batch in written(model, prompts, room, wishes.batch_size, stops, pad, wishes.how, names):
                    for i, ids in batch:
                        one, k = wanted[i]
                        self.answers += 1
                        self.cut += not ids or ids[-1] not in stops
                        if one.continues:
                            ended = ids[:-1] if ids and ids[-1] in stops else ids
                            one.texts[which][k] = writer.prompter.continuation(prompts[i], ended)
                        else:
                            found = behind_thinking(encoder, prompts[i], decode(encoder, ids, stops))
                            one.texts[which][k] = found["prediction"]
                            one.thoughts[which][k] = found.get("thinking", "")
                        one.left -= 1
                    yield

    def tell(self) -> None:
        note(f"{self.rows - len(self.bad):,} of {self.rows:,} rows answered")
        if self.cut:
            note(f"{self.cut:,} of {self.answers:,} answers are cut at {self.wishes.max_new_tokens} tokens or less")
        for problem in self.bad[:SHOWN]:
            warn(str(problem))
        if self.bad:
            warn(f"{len(self.bad):,} rows could not be asked: {COLUMN} is null there, and `{ERRORS[0]}` says why")
