"""Test prompts that were seen in training, found without comparing each with each."""

from __future__ import annotations

import random

from finetune.data import leakage


def test_case_and_spacing_are_no_difference_and_other_words_are() -> None:
    index = leakage.Index(["Where is the  old Harbour office?", "Who pays?"])
    assert index.search(["where is the old harbour OFFICE?"]) == [(0, 0, 1.0)]
    assert index.search(["who paid?"]) == []


def test_rows_that_only_share_a_pattern_are_no_leak() -> None:
    r = random.Random(0)

    def prompt() -> str:
        name = "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(9))
        order, place = r.randrange(10**9), f"{name[::-1]} street {r.randrange(99)}"
        return f"Customer {name} wrote about order {order}: the parcel to {place} is late."

    index = leakage.Index([prompt() for _ in range(300)])
    assert index.search([prompt() for _ in range(300)]) == []


def test_leakage_in_batches_is_the_same_as_one_by_one() -> None:
    r = random.Random(1)
    texts = ["".join(r.choice("abcdef gh") for _ in range(r.randint(1, 300))) for _ in range(200)]
    index = leakage.Index(texts[:50])
    together = index.search(texts)
    assert together[:50] == [(i, i, 1.0) for i in range(50)]
    assert together == [(i, match, share) for i, t in enumerate(texts) for _, match, share in index.search([t])]


def test_what_stands_in_every_prompt_says_nothing_and_costs_nothing() -> None:
    """A long instruction around short questions: what is a row's own tells it apart from the others."""
    frame = "You are the help desk of a large shop. Answer politely, briefly and in the language of the customer. " * 3

    def prompt(n: int) -> str:
        return f"{frame} {n * 7919 % 100_003} orders of kind {n * 104_729 % 99_991} are late, what now? {n * 31 % 9973}"

    held = [prompt(n) for n in range(200)]
    index = leakage.Index(held)
    assert index.search([prompt(n) for n in range(200, 400)]) == []
    assert max(index.sizes) < 60, "only what is a row's own is kept"
    assert index.near([held[7] + " Please!"])[0][:2] == (0, 7)
    few = leakage.Index(held[:30])
    assert max(few.sizes) > 90, "of a few prompts nobody can say what is a template"
