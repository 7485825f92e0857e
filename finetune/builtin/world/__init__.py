"""A small synthetic world of customer tickets in English and Chinese, the same for everyone and without copyright.

    documents(seed)                    raw text for pre-training
    tickets(seed, n, split, phrasing)  rows of the extraction task
    questions(seed, n, split)          rows of questions about one field, not all of which can be answered
    pairs(seed, n, split)              preference pairs of answers to such questions
    HAN                                the characters of its values
    leaks(text)                        reserved (test-only) values in a text

`python -m finetune.builtin.world --write data_templates` writes the shipped files.
"""

from finetune.builtin.world.corpus import HAN, documents
from finetune.builtin.world.questions import pairs, questions
from finetune.builtin.world.tickets import KEYS, record, tickets, write
from finetune.builtin.world.vocabulary import leaks

__all__ = ["HAN", "KEYS", "documents", "leaks", "pairs", "questions", "record", "tickets", "write"]
