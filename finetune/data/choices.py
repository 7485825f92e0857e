"""Multiple choice as C-Eval, CMMLU and MMLU publish it: csv files, one for each subject and split.

    C-Eval   val/physics_val.csv     id,question,A,B,C,D,answer,explanation   (test files have no answers)
    CMMLU    test/physics.csv        ,Question,A,B,C,D,Answer
    MMLU     test/physics_test.csv   no header: question, options, answer

A file is known by its content. dev files hold the shots; a folder is measured on its test split, or on val where the
test split has no answers.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.types import Message, Sample
from finetune.errors import Problem, UserError
from finetune.metrics.text import CHINESE
from finetune.places import read_json

LETTERS = "ABCDEFGHIJ"
SPLITS = {"dev": "dev", "val": "val", "valid": "val", "validation": "val", "test": "test", "train": "train",
          "auxiliary_train": "train"}  # fmt: skip
ENDING = re.compile(r"[_-](dev|val|valid|validation|test|train)$", re.IGNORECASE)
NAMES = "subject_mapping.json"


@dataclass(slots=True)
class Choice(Sample):
    text: str
    """The question."""
    options: tuple[str, ...]
    """A, B, …"""
    answer: int | None
    """Place of the right one."""
    layout: str
    """A row of `evaluation.choices.LAYOUTS`: how it is asked."""
    subject: str
    """As a prompt names it."""

    @property
    def turns(self) -> list[Message]:
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return [{"role": "user", "content": "\n".join([self.text, *listed])}]

    @property
    def reference(self) -> str | None:
        return None if self.answer is None else LETTERS[self.answer]

    def fingerprint(self) -> int:
        return hash((self.text, self.options))


class Question(NamedTuple):
    """A row of a file."""

    file: str
    row: int
    sample: Choice
    columns: dict[str, Any]


class Sheet(NamedTuple):
    """A file, by what it is called."""

    path: Path
    subject: str
    split: str
    """dev, val, test, train or "" where neither its name nor its folder says one."""


def sheet(path: Path) -> Sheet:
    ending = ENDING.search(path.stem)
    word = ending[1] if ending else path.parent.name
    return Sheet(path, path.stem[: ending.start()] if ending else path.stem, SPLITS.get(word.lower(), ""))


# --- which files ---


def is_choices(path: Any) -> bool:
    """Whether a path is a file of multiple choice, or a folder of which most csv files are."""
    place = Path(str(path)).expanduser()
    files = csv_files(place)
    return bool(files) and 2 * sum(map(known, files)) > len(files)


def csv_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place] if place.suffix.lower() == ".csv" else []
    found = place.rglob("*.csv") if place.is_dir() else []
    return sorted(f for f in found if not any(part.startswith((".", "_")) for part in f.relative_to(place).parts))


def known(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row, _ in zip(csv.reader(io.StringIO(file.read(1 << 16))), range(1), strict=False)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    return bool(rows) and (columns_of(rows[0]) is not None or is_bare(rows[0]))


def columns_of(cells: Sequence[str]) -> dict[str, int] | None:
    """{question, answer, A, B, …: place} of a header; None for a line that is none."""
    places = {cell.strip().lower(): i for i, cell in enumerate(cells)}
    if not {"question", "a", "b"} <= places.keys():
        return None
    letters = [letter for letter in LETTERS if letter.lower() in places]
    if "".join(letters) != LETTERS[: len(letters)]:
        return None
    named = {"question": places["question"], **{letter: places[letter.lower()] for letter in letters}}
    return named | ({"answer": places["answer"]} if "answer" in places else {})


def is_bare(cells: Sequence[str]) -> bool:
    """Whether a line without header is MMLU's: question, options, the letter of one of them."""
    answer = cells[-1].strip() if len(cells) > 3 else ""
    return len(answer) == 1 and answer in LETTERS[: len(cells) - 2]


def evaluated(path: str) -> list[Sheet]:
    """The files of a path to measure on. UserError when none has answers."""
    place = Path(path).expanduser()
    found = [sheet(file) for file in csv_files(place)]
    if place.is_file():
        return found
    names = {one.split for one in found}
    for split in ("test", "val", "", "dev", "train"):
        chosen = [one for one in found if one.split == split]
        if chosen and (any(has_answers(one.path) for one in chosen) or not names - {split, "dev", "train"}):
            return chosen
    raise UserError("no file has answers", path=path, fix="give the folder with the val split, too")


def has_answers(path: Path) -> bool:
    try:
        return any(question.sample.answer is not None for question in read(path, answered=False))
    except UserError:
        return True  # what is wrong is told when it is read for good


def dev_file(one: Sheet) -> Path | None:
    """Where the shots of a subject stand: beside the file, or in the folder dev beside its own."""
    near = [one.path.parent, one.path.parent.parent / "dev"]
    names = [f"{one.subject}_dev.csv", f"{one.subject}-dev.csv"]
    files = [folder / name for folder in near for name in names] + [near[1] / f"{one.subject}.csv"]
    return next((file for file in files if file.is_file() and file != one.path), None)


def subject_name(one: Sheet) -> str:
    """As it stands in a prompt: its Chinese name where C-Eval's subject_mapping.json lies beside, else its own."""
    for folder in one.path.parents[:3]:
        names = read_json(folder / NAMES).get(one.subject)
        if isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names):
            return str(names[1])
    return " ".join(one.subject.replace("_", " ").split())


# --- their rows ---


def read(path: Path, answered: bool = True) -> list[Question]:
    """The questions of a file. UserError with every unusable row; with `answered` one without an answer is one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not UTF-8", path=path, fix="convert it: iconv -f gb18030 -t utf-8") from None
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if any(map(str.strip, line))]
    except csv.Error as error:
        raise UserError(f"not valid csv: {error}", path=path, fix="mend the quotes") from None
    if not lines:
        raise UserError("the file is empty", path=path, fix="name a file with questions")
    header = columns_of(lines[0])
    if header is None and not is_bare(lines[0]):
        fix = "give the columns question, A, B, C, D, answer, or no header and these in order"
        raise UserError("is no file of multiple choice", path=path, line=1, fix=fix)
    titles = [str(cell).strip() for cell in lines[0]] if header else []
    layout, subject = layout_of(titles, text), subject_name(sheet(path))
    problems: list[Problem] = []
    found: list[Question] = []
    for number, cells in enumerate(lines[1:] if header else lines, 1):
        try:
            sample = choice(cells, header, layout, subject)
        except ValueError as error:
            problems.append(Problem(str(error), path, number, fix="mend the row"))
            continue
        columns = dict(zip(titles or bare_titles(len(cells)), cells, strict=False))
        found.append(Question(str(path), number, sample, columns))
    if answered and found and all(question.sample.answer is None for question in found):
        what = "has no answers (C-Eval publishes its test set without: they are to be sent in)"
        raise UserError(what, path=path, fix="measure on the val split")
    without = [question.row for question in found if answered and question.sample.answer is None]
    problems += [Problem("has no answer", path, row, fix="take it out, or give its letter") for row in without]
    if problems:
        raise UserError(problems)
    if not found:
        raise UserError("has a header and no question", path=path, fix="name a file with questions")
    return found


def bare_titles(count: int) -> list[str]:
    return ["question", *LETTERS[: count - 2], "answer"]


def layout_of(titles: Sequence[str], text: str) -> str:
    """How questions are asked: in Chinese as C-Eval's, or CMMLU's (its header has capitals); otherwise as MMLU's."""
    if CHINESE.search(text) is None:
        return "mmlu"
    return "cmmlu" if {"Question", "Answer"} <= set(titles) else "ceval"


def choice(cells: Sequence[str], header: dict[str, int] | None, layout: str, subject: str) -> Choice:
    """ValueError for a row that is no question."""
    header = header or {title: place for place, title in enumerate(bare_titles(len(cells)))}
    if len(cells) <= max(header.values()) or len(cells) < 4:
        raise ValueError(f"{len(cells)} cells are too few")
    question = cells[header["question"]].strip()
    options = [cells[header[letter]].strip() for letter in LETTERS if letter in header]
    while options and not options[-1]:  # fewer than the others have
        options.pop()
    if not question:
        raise ValueError("the question is empty")
    if len(options) < 2 or not all(options):
        raise ValueError("an option is empty")
    given = cells[header["answer"]].strip().upper() if "answer" in header else ""
    letters = LETTERS[: len(options)]
    if given and (len(given) != 1 or given not in letters):
        raise ValueError(f"the answer {given!r} is none of {', '.join(letters)}")
    return Choice(question, tuple(options), letters.index(given) if given else None, layout, subject)
