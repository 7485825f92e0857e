"""The synthetic world: the same for everyone, and nothing that tests ask is ever seen in training."""

import json
import random
import re
from itertools import islice

import pytest

from finetune.builtin.world import KEYS, documents, leaks, record, tickets, write
from finetune.builtin.world.__main__ import SHIPPED, jsonl, shipped
from finetune.builtin.world.phrasings import CLAUSES, FIELDS, FULL, PAIRS, SMALL_TALK, UNSEEN
from finetune.builtin.world.vocabulary import REAL_NAMES
from finetune.resources import resource_path


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    early, late = documents(0, total=2_500), documents(3, total=1)
    return [*islice(early, 2_500), *islice(late, 2_500)]


def answers(rows: list[dict]) -> list[dict]:
    return [json.loads(row["messages"][1]["content"]) for row in rows]


TRAIN, TEST = shipped("tickets_train.jsonl"), shipped("tickets_test.jsonl")
HELD_OUT = {
    "test": TEST,
    "other seed": tickets(7, 300, "test"),
    "unseen phrasing": tickets(8, 300, "test", "unseen"),
    "real names": tickets(9, 300, "real"),
}


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    assert list(islice(documents(5), 50)) == list(islice(documents(5), 50))
    assert list(islice(documents(5), 50)) != list(islice(documents(6), 50))
    assert tickets(5, 20) == tickets(5, 20) != tickets(6, 20)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_are_what_the_generator_writes(name):
    assert resource_path("data_templates", name).read_bytes() == jsonl(shipped(name)).encode()


@pytest.mark.parametrize("kind", HELD_OUT)
def test_held_out_names_and_ids_occur_in_no_training_text(kind, corpus):
    seen = "\n".join([*corpus, *(message["content"] for row in TRAIN for message in row["messages"])])
    for values in answers(HELD_OUT[kind]):
        for value in (*values["name"].split(), values["order"]):
            assert value not in seen  # as a substring: stronger than "as a value"


@pytest.mark.parametrize("kind", HELD_OUT)
def test_held_out_rows_share_no_name_order_or_combination_with_training(kind):
    train, held = answers(TRAIN), answers(HELD_OUT[kind])
    for keys in (("name",), ("order",), ("name", "order"), ("name", "city"), ("order", "product"), KEYS):
        assert not {tuple(v[k] for k in keys) for v in train} & {tuple(v[k] for k in keys) for v in held}


def test_reservation_covers_an_eighth_and_no_template_word():
    r = random.Random(0)
    for lang, make in (("en", "name"), ("zh", "name"), ("en", "order")):
        values = [record(r, lang)[make] for _ in range(300)]
        assert not any(leaks(v) for v in values)
    assert all(leaks(name) for name in REAL_NAMES)
    for table in (CLAUSES, PAIRS):
        for lang in table.values():
            for templates in lang.values():
                assert not leaks("\n".join(templates))
    assert not leaks("\n".join(t for table in (FULL, SMALL_TALK) for ts in table.values() for t in ts))


def test_corpus_is_raw_text(corpus):
    text = "\n".join(corpus)
    for mark in ("<|", "|>", "assistant", "Extract", "整理成", "[gMASK]", "Instruction"):
        assert mark not in text
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", d)) for d in corpus) / len(corpus)
    assert 0.4 < chinese < 0.9


def test_rows_ask_in_both_languages_and_answer_with_one_key_set():
    rows = [*TRAIN, *TEST]
    assert all(tuple(values) == KEYS for values in answers(rows))
    english = sum(row["messages"][0]["content"].startswith("Extract") for row in TEST)
    assert english == len(TEST) // 2
    for row in rows:
        ticket = row["messages"][0]["content"]
        values = json.loads(row["messages"][1]["content"])
        assert all(values[key] in ticket for key in KEYS if key != "category")


def test_unseen_phrasings_are_in_no_training_text(corpus):
    for lang, templates in UNSEEN.items():
        known = set(FULL[lang]) | {t for table in (CLAUSES, PAIRS) for ts in table[lang].values() for t in ts}
        assert not known & set(templates)
        seen = "\n".join([*corpus, *(row["messages"][0]["content"] for row in TRAIN)])
        for template in templates:
            literals = [re.escape(part) for part in re.split(r"\{\w+\}", template)]
            assert not re.search(".{1,30}?".join(literals), seen)


def test_a_partial_ticket_tells_exactly_its_fields():
    r = random.Random(1)
    for _ in range(300):
        values = record(r, r.choice(("en", "zh")))
        fields = r.sample(FIELDS, r.randint(1, 5))
        text = write(r, values, fields)
        assert all(values[field] in text for field in fields)
        assert ("order" in fields) == (values["order"] in text)
