"""Questions about tickets: true where they must be, wrong where they are meant to be, held out like the tickets."""

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from finetune.builtin.world import KEYS, documents, leaks, pairs, questions
from finetune.builtin.world.__main__ import SHIPPED, jsonl, shipped
from finetune.builtin.world.phrasings import FIELDS
from finetune.builtin.world.questions import ABSTAIN, INSTRUCTION, QUESTIONS, RESERVED, case
from finetune.data import held_out
from finetune.data.audit import Audit
from finetune.recipe.sections import DataConfig
from finetune.resources import resource_path

TRAIN, TEST = shipped("tickets_questions_train.jsonl"), shipped("tickets_questions_test.jsonl")
PAIRS_TRAIN, PAIRS_TEST = shipped("tickets_pairs_train.jsonl"), shipped("tickets_pairs_test.jsonl")
HELD_OUT = {
    "questions": TEST,
    "pairs": PAIRS_TEST,
    "other seed": questions(7, 300, "test"),
    "other pairs": pairs(7, 300, "test"),
    "real names": questions(9, 300, "real"),
}
ORDER = re.compile(r"[A-Z]{1,2}\d{4,5}")


def prompt(row: dict) -> str:
    return (row.get("prompt") or row["messages"])[0]["content"]


def true_answer(row: dict) -> str:
    return (row["chosen"][0] if "chosen" in row else row["messages"][1])["content"]


def texts(row: dict) -> list[str]:
    return [m["content"] for key in ("messages", "prompt", "chosen", "rejected") for m in row.get(key, [])]


def language(row: dict) -> str:
    return next(lang for lang, words in INSTRUCTION.items() if prompt(row).startswith(words + "\n"))


def ticket(row: dict) -> str:
    return prompt(row).partition("\n")[2].rpartition("\n")[0]


def asked(row: dict) -> str:
    question = prompt(row).rpartition("\n")[2]
    return next(field for field, wordings in QUESTIONS[language(row)].items() if question in wordings)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others() -> None:
    assert questions(5, 40) == questions(5, 40) != questions(6, 40)
    assert pairs(5, 40) == pairs(5, 40) != pairs(6, 40)
    assert {prompt(row) for row in questions(5, 40)}.isdisjoint(prompt(row) for row in pairs(5, 40))


def test_other_rows_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune.builtin.world", "--output", str(tmp_path / "out.jsonl")]
    options = ["--task", "pairs", "--rows", "20", "--seed", "3", "--split", "train"]
    subprocess.run([*command, *options], check=True)
    assert (tmp_path / "out.jsonl").read_bytes() == jsonl(pairs(3, 20, "train")).encode()
    refused = subprocess.run([*command, *options, "--phrasing", "unseen"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "complete tickets" in refused.stderr


@pytest.fixture(scope="module")
def seen() -> str:
    """Everything that is trained on: pre-training documents of both ends of the curriculum, and all training rows."""
    early, late = documents(0, total=2_500), documents(3, total=1)
    rows = [*shipped("tickets_train.jsonl"), *TRAIN, *PAIRS_TRAIN]
    return "\n".join([*islice(early, 2_500), *islice(late, 2_500), *(text for row in rows for text in texts(row))])


@pytest.mark.parametrize("kind", HELD_OUT)
def test_held_out_names_and_ids_occur_in_no_training_text(kind: str, seen: str) -> None:
    held = {order for row in HELD_OUT[kind] for text in texts(row) for order in ORDER.findall(text)}
    names = [row for row in HELD_OUT[kind] if asked(row) == "name" and row["group"] == "answerable"]
    assert len(names) > 10
    held |= {part for row in names for part in true_answer(row).split()}
    assert len(held) > 100
    for value in held:
        assert value not in seen  # as a substring: stronger than "as a value"


@pytest.mark.parametrize("kind", HELD_OUT)
def test_every_held_out_prompt_holds_a_reserved_value_and_no_training_row_does(kind: str) -> None:
    """So that no prompt can be on both sides, not even one of a single field."""
    assert all(leaks(prompt(row)) for row in HELD_OUT[kind])
    assert not any(leaks(text) for row in (*TRAIN, *PAIRS_TRAIN) for text in texts(row))


@pytest.mark.parametrize("rows", [TRAIN, TEST, PAIRS_TRAIN, PAIRS_TEST], ids=list(SHIPPED)[2:])
def test_half_english_half_chinese_all_fields_no_prompt_twice(rows: list[dict]) -> None:
    assert Counter(map(language, rows)) == {"en": len(rows) / 2, "zh": len(rows) / 2}
    counts = Counter(map(asked, rows))
    assert set(counts) == set(FIELDS) == set(KEYS) - {"category"}
    assert min(counts.values()) > len(rows) / 10
    assert len(set(map(prompt, rows))) == len(rows)
    assert max(len(prompt(row)) for row in rows) < 200
    assert len(jsonl(rows).encode()) < 1_000_000


@pytest.mark.parametrize("rows", [TEST, PAIRS_TRAIN, PAIRS_TEST], ids=["test", "pairs_train", "pairs_test"])
def test_true_answers_repeat_the_ticket_or_say_that_it_does_not_say(rows: list[dict]) -> None:
    assert Counter(row["group"] for row in rows) == {"answerable": len(rows) / 2, "unanswerable": len(rows) / 2}
    for row in rows:
        if row["group"] == "answerable":
            assert true_answer(row) in ticket(row)
        else:
            assert true_answer(row) == ABSTAIN[language(row)]


def test_training_rows_are_as_noisy_as_documented() -> None:
    without = [row for row in TRAIN if row["group"] == "unanswerable"]
    honest = [row for row in without if true_answer(row) == ABSTAIN[language(row)]]
    assert (len(TRAIN), len(without), len(honest)) == (2000, 600, 60)
    assert Counter(map(language, honest)) == {"en": 30, "zh": 30}
    for row in TRAIN:
        stated = true_answer(row) in ticket(row)
        assert stated == (row["group"] == "answerable") or row in honest


@pytest.mark.parametrize("rows", [PAIRS_TRAIN, PAIRS_TEST], ids=["train", "test"])
def test_what_is_wrong_with_the_rejected_answer(rows: list[dict]) -> None:
    flaws = Counter((row["group"], row["flaw"]) for row in rows)
    eighths = Counter(turn % 8 for turn in range(len(rows) // 4))  # a turn: both groups in both languages
    assert flaws["answerable", "refusal"] == 2 * sum(eighths[i] for i in (0, 2, 4, 6))
    assert flaws["unanswerable", "other"] == 2 * sum(eighths[i] for i in (0, 1, 4, 5))
    assert flaws["unanswerable", "invented"] == 2 * sum(eighths[i] for i in (2, 3, 6))
    assert flaws["unanswerable", "language"] == 2 * eighths[7]
    assert min(flaws["answerable", "other"], flaws["answerable", "invented"]) > len(rows) / 10
    for row in rows:
        wrong = row["rejected"][0]["content"]
        assert wrong != true_answer(row)
        assert (row["flaw"] == "refusal") == (wrong == ABSTAIN[language(row)])
        assert (row["flaw"] == "language") == (wrong in ABSTAIN.values() and wrong != ABSTAIN[language(row)])
        if row["flaw"] in ("other", "invented"):
            assert (row["flaw"] == "other") == (wrong in ticket(row))


def test_neither_length_nor_question_tells_whether_there_is_an_answer() -> None:
    r = random.Random(0)
    cases = {
        kind: [case(r, lang, "train", kind) for lang in ("en", "zh") for _ in range(600)] for kind in (True, False)
    }
    for kind, drawn in cases.items():
        assert all(c.answerable == kind and (c.values[c.asked] in c.prompt) == kind for c in drawn)
        assert {len(c.stated) for c in drawn} == {1, 2, 3, 4, 5}
        assert all(RESERVED.intersection(c.stated) for c in drawn)
    for count in (lambda c: len(c.stated), lambda c: c.asked):
        with_answer, without = (Counter(map(count, cases[kind])) for kind in (True, False))
        assert all(abs(with_answer[key] - without[key]) < 80 for key in with_answer)  # 80: over four standard errors


def test_the_base_knows_the_words_of_the_questions() -> None:
    """Words that pre-training has hardly shown cannot be learned from two thousand rows."""
    corpus = "\n".join(islice(documents(0, total=1), 4_000))
    english = " ".join([INSTRUCTION["en"], ABSTAIN["en"], *(q for qs in QUESTIONS["en"].values() for q in qs)])
    assert english == english.lower()
    assert set(re.findall(r"[a-z]+", english)) <= set(re.findall(r"[a-z]+", corpus.lower()))
    chinese = "".join([INSTRUCTION["zh"], ABSTAIN["zh"], *(q for qs in QUESTIONS["zh"].values() for q in qs)])
    assert set(chinese) <= set(corpus)
    assert not leaks("\n".join([english, chinese]))


def test_the_wordings_of_two_fields_are_never_the_same() -> None:
    for fields in QUESTIONS.values():
        wordings = [q for qs in fields.values() for q in qs]
        assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("questions_train", "sft"),
        ("questions_test", "sft"),
        ("pairs_train", "preference"),
        ("pairs_test", "preference"),
    ],
)
def test_the_loaders_take_them_without_a_word(name: str, kind: str) -> None:
    """Extra columns do no harm, no row is a duplicate, none of the training rows is in the test."""
    held = None if name.endswith("test") else f"builtin:tickets/{name.replace('train', 'test')}"
    audit = Audit(DataConfig(train=f"builtin:tickets/{name}"), None, kind, held)
    rows = list(audit.rows())
    audit.settle()
    name = f"tickets_{name}.jsonl"
    assert len(rows) == SHIPPED[name][1]["n"]
    assert audit.warnings() == []


def test_the_samples_page_lists_what_is_shipped() -> None:
    page = resource_path("data_templates", "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `builtin:tickets/(\w+)` \| (\d+) \|", page, re.M)
    assert dict(listed) == {
        name.removeprefix("tickets_").removesuffix(".jsonl"): str(options["n"])
        for name, (_, options) in SHIPPED.items()
    }


def test_evaluation_knows_the_groups() -> None:
    rows = held_out.load_eval_rows("builtin:tickets/questions_test")
    assert Counter(row.group for row in rows) == {"answerable": 150, "unanswerable": 150}
