"""Raw text for pre-training: copy drills, and tickets beside other renderings of the same record.

No instructions, no chat markup: what the text teaches is to carry unseen strings from one layout to another, which is
all that fine-tuning on the tickets needs and cannot teach in two minutes by itself.
"""

import json
import random
from collections.abc import Iterator, Sequence

from finetune.builtin.world import vocabulary as words
from finetune.builtin.world.phrasings import FIELDS, LABELS
from finetune.builtin.world.tickets import KEYS, Record, loose, record, write

DRILLS = (0.60, 0.15)  # share of the documents at the start and after half of the corpus
CHECKED = 0.2  # share of the other documents that end in proofread entries
HAN = sorted(
    {c for table in (words.PRODUCTS, words.ADJECTIVES, words.CITIES) for _, text in table for c in text}
    | set(words.SURNAMES + words.GIVEN)
    | set("".join(text for _, zh, _, issues in words.CATEGORIES for text in (zh, *issues)))
    | set("".join(label for labels in LABELS["zh"].values() for label in labels))
    | set("工单整理成提取信息没有提到是什么不知道年月日元号市县镇问答核对错")
)
_BREAKS = (", ", " ", "; ", "\n", " | ", "、", ",", "/")
_TABLES = (  # (between key and value, between entries)
    (": ", "\n"), ("=", "; "), (" ", " | "), (": ", ", "), ('": "', '", "'), ("是", "。"), (":", "\n"), ("\t", "\n"),
)  # fmt: skip


def documents(seed: int, total: int = 80_000) -> Iterator[str]:
    """Endless documents; copy drills fall from the first share of DRILLS to the second over `total` / 2 of them."""
    r = random.Random(f"documents/{seed}")
    count = 0
    while True:
        document = text(r, count / total)
        if not words.leaks(document):  # neighbouring values can form a reserved name by accident
            yield document
            count += 1


def text(r: random.Random, progress: float) -> str:
    """One document of the corpus at `progress` (0 to 1) of the curriculum."""
    first, last = DRILLS
    return drill(r) if r.random() < first + (last - first) * min(1.0, 2 * progress) else renderings(r)


def renderings(r: random.Random) -> str:
    """A ticket, whole or partial, and the same record in one to three other layouts."""
    values = record(r, r.choice(words.LANGUAGES), surnames=True)
    fields = list(FIELDS) if r.random() < 0.6 else [f for f in FIELDS if r.random() < 0.65] or ["order", "name"]
    known = [key for key in KEYS if key in fields or (key == "category" and "product" in fields)]
    parts = [(loose if r.random() < 0.55 else write)(r, values, fields)]
    for _ in range(r.choice((1, 2, 2, 3))):
        parts.append(_render(r, values, r.sample(known, r.randint((len(known) + 1) // 2, len(known)))))
    if r.random() < 0.2:
        r.shuffle(parts)
    if r.random() < CHECKED:
        parts.append(_checked(r, values, fields))
    return "\n".join(parts)


def _render(r: random.Random, values: Record, keys: Sequence[str]) -> str:
    labels = LABELS[values["lang"]]
    synonyms = r.random() < 0.4
    english = values["lang"] == "en" or r.random() < 0.4
    label = {k: r.choice(labels[k]) if synonyms else k if english else labels[k][0] for k in keys}
    style = r.randrange(8)
    if style < 3:
        return json.dumps({label[k]: values[k] for k in keys}, ensure_ascii=False)
    if style == 3:
        return write(r, values, [k for k in keys if k != "category"] or ["order"])
    if style == 4:
        zh = values["lang"] == "zh"
        return "\n".join(f"{label[k]}是{values[k]}。" if zh else f"The {k} is {values[k]}." for k in keys)
    between, after = r.choice(_TABLES)
    return after.join(label[k] + between + values[k] for k in keys)


def _checked(r: random.Random, values: Record, stated: Sequence[str]) -> str:
    """Entries of a list and what somebody who compared them with the ticket wrote behind each: right or wrong.

    Wrong is a value of another field, or one that the ticket does not state. Telling them apart is what a reward model
    is made of; predicting the mark needs the whole value, where copying needs one token at a time.
    """
    labels, lang = LABELS[values["lang"]], values["lang"]
    head, right, wrong = ("checked: ", " ok", " wrong") if lang == "en" else ("核对:", " 对", " 错")
    between, after = r.choice(_TABLES)
    entries = []
    for key in r.sample(FIELDS, r.randint(2, 4)):
        value, mark = values[key], right
        if key not in stated or r.random() < 0.5:
            others = [values[field] for field in stated if field != key]
            value = r.choice(others) if others and r.random() < 0.3 else record(r, lang, surnames=True)[key]
            mark = right if key in stated and value == values[key] else wrong
        entries.append(r.choice(labels[key]) + between + value + mark)
    return head + after.join(entries)


def drill(r: random.Random) -> str:
    """Three to seven values, and the same again: repeated word for word, as a list in other layouts and orders, or as a
    table whose keys come back in another order. The first kind is what copying starts from, the last what it is for."""
    size, kind = r.randint(3, 7), r.random()
    if kind < 0.45:
        make = characters if r.random() < 0.3 else value
        line = r.choice(_BREAKS).join(make(r) for _ in range(size))
        return r.choice(("\n", " ", "; ")).join([line] * r.choice((2, 2, 3)))
    if kind < 0.65:
        items = [value(r) for _ in range(size)]
        lines = [r.choice(_BREAKS).join(items)]
        for _ in range(r.choice((1, 2, 3))):
            if r.random() < 0.5:
                r.shuffle(items)
            lines.append(r.choice(_BREAKS).join(items))
        return "\n".join(lines)
    names = [key for labels in LABELS.values() for key in labels]
    table = {value(r) if r.random() < 0.5 else r.choice(names): value(r) for _ in range(size)}
    keys, lines = list(table), []
    for _ in range(r.choice((2, 3, 4))):
        between, after = r.choice(_TABLES)
        lines.append(after.join(key + between + table[key] for key in keys))
        r.shuffle(keys)
    return "\n".join(lines)


def characters(r: random.Random) -> str:
    """Two to four characters of the world: each is one token, so that copying them is the easiest copying there is."""
    return "".join(r.choices(HAN, k=r.randint(2, 4)))


def value(r: random.Random) -> str:
    """Something to copy: any value of a ticket, a made-up word, or a run of letters, digits or characters."""
    lang, kind = r.choice(words.LANGUAGES), r.randrange(10)
    if kind == 0:
        return words.english_word(r).capitalize()
    if kind == 1:
        return words.english_name(r, reserved=False, surnames=True)
    if kind == 2:
        return words.chinese_name(r, reserved=False)
    if kind == 3:
        return words.order_id(r, reserved=False)
    if kind == 4:
        return words.product(r, lang)
    if kind == 5:
        return words.made_up_city(r, lang) if r.random() < 0.6 else r.choice(words.CITIES)[lang == "zh"]
    if kind == 6:
        return r.choice((words.amount(r), words.date(r, lang)))
    if kind == 7:
        return characters(r)
    if kind == 8:  # few letters, often doubled: where a word ends must be read, not guessed
        return "".join(r.choices(r.sample("abcdefghijklmnopqrstuvwxyz", 4), k=r.randint(2, 6)))
    if r.random() < 0.75:
        return words.english_word(r)
    # characters outside the world, so that every byte of the tokenizer is known
    return "".join(chr(r.choice((r.randint(0x4E00, 0x9FA5), r.randint(0xC0, 0x24F)))) for _ in range(r.randint(1, 2)))
