"""Tickets: a record of values, the text a customer writes, and the rows of the extraction task."""

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

from finetune.builtin.world import vocabulary as words
from finetune.builtin.world.phrasings import CLAUSES, CUES, FIELDS, FILLERS, FULL, LABELS, PAIRS, SMALL_TALK, UNSEEN

KEYS = ("name", "order", "product", "city", "category", "date", "amount")
# Small letters: capitals would be taken for those of an order id.
INSTRUCTION = {"en": "Extract the ticket as json.", "zh": "把工单整理成json。"}

Record = dict[str, str]
Split = Literal["train", "test", "real"]


def record(
    r: random.Random, lang: str, split: Split = "train", surnames: bool = False, made_up: bool = False
) -> Record:
    """The values of one ticket, all in `lang`, plus `lang` itself and `issue`, the customer's words for the category.

    split: "train" uses no reserved value; in "test" every name and order id is reserved; "real" is "test" with
    first names that people really have (English) instead of made-up ones. surnames: some English names have two words.
    The corpus has them; the tasks do not, as a base of two million parameters cannot tell reliably where they end.
    made_up: every English city is made up, and known by how it begins. Beijing is spelled like a made-up name, and a
    base that has to choose at its first letters takes one for the other.
    """
    reserved, zh = split != "train", lang == "zh"
    *category, says_en, says_zh = r.choice(words.CATEGORIES)
    if zh:
        name = words.chinese_name(r, reserved)
    else:
        name = r.choice(words.REAL_NAMES) if split == "real" else words.english_name(r, reserved, surnames)
    city = r.choice(words.CITIES)[zh]
    if r.random() < 0.4 or (made_up and not zh):
        city = words.draw(lambda: words.made_up_city(r, lang), reserved=False)
    return {
        "lang": lang,
        "name": name,
        "order": words.order_id(r, reserved),
        "product": words.product(r, lang),
        "city": city,
        "category": str(category[zh]),
        "issue": r.choice(says_zh if zh else says_en),
        "date": words.date(r, lang),
        "amount": words.amount(r),
    }


def write(r: random.Random, values: Record, fields: Sequence[str] = FIELDS, phrasing: str = "seen") -> str:
    """A ticket that states exactly `fields` of a record, in one of very many phrasings.

    phrasing: "seen", as in training; "unseen", a template that appears in no training data (complete tickets only).
    """
    lang, complete = values["lang"], len(fields) == len(FIELDS)
    if phrasing == "unseen":
        if not complete:
            raise ValueError("unseen phrasings exist for complete tickets only")
        return r.choice(UNSEEN[lang]).format(**values)
    style = r.random()
    if complete and style < 0.45:
        return r.choice(FULL[lang]).format(**values)
    if style < 0.85:
        return _clauses(r, values, fields)
    return _form(r, values, fields)


def _clauses(r: random.Random, values: Record, fields: Sequence[str]) -> str:
    """Sentences in any order, each stating one or two fields, with small talk between."""
    lang = values["lang"]
    left, sentences = set(fields), []
    pairs = [pair for pair in PAIRS[lang] if left.issuperset(pair)]
    r.shuffle(pairs)
    for pair in pairs[: r.randint(0, 3)]:
        if left.issuperset(pair):
            sentences.append(r.choice(PAIRS[lang][pair]))
            left.difference_update(pair)
    sentences += [r.choice(CLAUSES[lang][field]) for field in fields if field in left]
    sentences += r.sample(SMALL_TALK[lang], r.choice((0, 0, 0, 1, 1, 2)))
    r.shuffle(sentences)
    return (" " if lang == "en" else "").join(sentences).format(**values)


def compose(r: random.Random, values: Record, fields: Sequence[str] = FIELDS, asides: bool = False) -> str:
    """Sentences made on the spot: the fields in any order, each in some cue, with ordinary words anywhere between.

    asides: some sentences state nothing at all, and begin with a capital like any other.

    Sentences begin with a capital whatever their first word is, as people write: the place explains the capital of an
    ordinary word, and only a word that is not an ordinary one is a name.
    """
    lang = values["lang"]
    zh = lang == "zh"
    gap = "" if zh else " "
    order = r.sample(list(fields), len(fields))
    text, opening = "", True
    for i, field in enumerate(order):
        if asides and opening and r.random() < 0.4:
            aside = gap.join(_fillers(r, lang, (1, 2, 3, 4)))
            aside = aside[:1].upper() + aside[1:]
            if not words.leaks(aside):
                text += aside + (r.choice("。!:") if zh else r.choice((". ", "! ", ": ", ", ")))
        words_before = _fillers(r, lang, (0, 0, 0, 1, 2, 3) if not opening else (0, 0, 1, 2, 3, 4))
        phrase = r.choice(CUES[lang][field]).format(**values)
        part = gap.join([*words_before, phrase])
        if opening and not part.startswith(values[field]):  # the answer repeats a value letter by letter
            capital = part[:1].upper() + part[1:]
            part = phrase if words.leaks(capital) else capital
        tail = _fillers(r, lang, (0, 0, 0, 0, 0, 1, 2))
        part = gap.join([part, *tail])
        opening = i == len(order) - 1 or r.random() < 0.4
        ends = ("。", "!", "。", "?", ";") if zh else (".", ".", ".", "!", "?", ".\n")
        english = (",", ",", "", "", ":", ";", " -", " /", " and", ", and")
        joints = (",", ",", "、", "", ":", "——", "/") if zh else english
        text += part + (r.choice(ends) if opening else r.choice(joints) or ("," if part[-1:].isalnum() else ""))
        if not text.endswith("\n"):
            text += gap
    return text.strip()


def _fillers(r: random.Random, lang: str, sizes: Sequence[int]) -> list[str]:
    return r.choices(FILLERS[lang], k=r.choice(sizes))


def loose(r: random.Random, values: Record, fields: Sequence[str] = FIELDS, asides: bool = False) -> str:
    """A ticket without a template."""
    return compose(r, values, fields, asides) if r.random() < 0.5 else ramble(r, values, fields)


def ramble(r: random.Random, values: Record, fields: Sequence[str] = FIELDS) -> str:
    """The values of `fields` in any order between words without meaning: only their looks tell what they are."""
    lang = values["lang"]
    zh = lang == "zh"
    parts = list(fields)
    if "product" in parts and r.random() < 0.5:  # what is wrong may stand far from what it is wrong with
        parts.append("issue")
    r.shuffle(parts)
    gap, text = ("" if zh else " "), ""
    ends = ("", "", ",", "。", ":", ";", "!") if zh else ("", "", ",", ".", ".", ":", ";", "!", "?")
    for part in parts:
        value = values[part]
        if part == "amount":
            value += "元" if zh else " yuan"
        if part == "product" and "issue" not in parts:
            value += gap + values["issue"]
        filler = _fillers(r, lang, (0, 1, 1, 2, 2, 3, 4))
        if not filler and text and text[-1].isalnum():  # side by side, two values would be one
            text += r.choice(",、:" if zh else ",:;.")
        if not zh and filler and r.random() < 0.15:
            filler[0] = words.english_word(r)
        elif filler and r.random() < 0.5 and not words.leaks(filler[0].capitalize()):
            filler[0] = filler[0].capitalize()  # an ordinary word: a capital alone makes no name
        text += gap.join([*([""] if text and text[-1] != "\n" else []), *filler, value])
        text += r.choice(ends)
        if r.random() < 0.1:
            text = text.rstrip() + "\n"
    return text + (gap + gap.join(r.choices(FILLERS[lang], k=r.randint(1, 3))) if r.random() < 0.5 else "")


def _form(r: random.Random, values: Record, fields: Sequence[str]) -> str:
    """Lines or cells of label and value."""
    names = [name for field in fields for name in ((field, "issue") if field == "product" else (field,))]
    r.shuffle(names)
    labels = LABELS[values["lang"]]
    between, after = r.choice(((": ", "\n"), (": ", "; "), (" ", ", "), (" = ", "\n"), (":", "\n"), (" | ", "\n")))
    return after.join(f"{r.choice(labels[name])}{between}{values[name]}" for name in names)


LOOSE = 0.4  # share of the training rows


def _ticket(r: random.Random, values: Record, split: Split, phrasing: str) -> str:
    """A ticket of the task. Loose training rows teach to tell values by their looks, whatever stands around them."""
    while True:
        free = split == "train" and r.random() < LOOSE
        ticket = loose(r, values, asides=True) if free else write(r, values, phrasing=phrasing)
        if split != "train" or not words.leaks(ticket):
            return ticket


def tickets(
    seed: int, n: int, split: Split = "train", phrasing: str = "seen", lang: str | None = None
) -> list[dict[str, Any]]:
    """`n` rows of the extraction task, half English and half Chinese unless `lang` names one.

    Returns [{"messages": [{"role": "user", "content": instruction + ticket}, {"role": "assistant", "content": JSON}]}].
    """
    r = random.Random(f"tickets/{seed}/{split}/{phrasing}/{lang}")
    rows = []
    for i in range(n):
        values = record(r, lang or words.LANGUAGES[i % 2], split, made_up=True)
        ticket = _ticket(r, values, split, phrasing)
        question = {"role": "user", "content": f"{INSTRUCTION[values['lang']]}\n{ticket}"}
        answer = json.dumps({key: values[key] for key in KEYS}, ensure_ascii=False)
        rows.append({"messages": [question, {"role": "assistant", "content": answer}]})
    r.shuffle(rows)
    return rows
