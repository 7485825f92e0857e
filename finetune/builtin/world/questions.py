"""Questions about a ticket: one value that it states, or that it does not state.

questions(seed, n, split)   SFT rows: {"messages": [user, assistant], "group": …}
pairs(seed, n, split)       preference pairs: {"prompt": […], "chosen": […], "rejected": […], "group": …, "flaw": …}

group   "answerable": the ticket states the value, and the answer is that value, letter by letter;
        "unanswerable": it does not, and the answer says so (ABSTAIN)
flaw    what is wrong with the rejected answer: "invented" (a value that nobody stated), "other" (a value of the ticket
        that was not asked for), "refusal" (says that a stated value is not stated), "language" (says so in the other
        language)

Training rows are noisy on purpose, as the work of hurried annotators is: to most questions that cannot be answered they
invent a value. What a model learns from them is what the pairs are there to mend.
"""

import random
from typing import Any, NamedTuple

from finetune.builtin.world import vocabulary as words
from finetune.builtin.world.phrasings import FIELDS
from finetune.builtin.world.tickets import Record, Split, compose, record, write

# Small letters, as in the extraction task: capitals would be taken for those of a name or an order id.
INSTRUCTION = {"en": "answer from the ticket.", "zh": "看工单回答。"}
ABSTAIN = {"en": "not stated", "zh": "没有提到"}

# Words that the pre-training corpus is rich in: a base of two million parameters knows no others.
QUESTIONS: dict[str, dict[str, list[str]]] = {
    "en": {
        "name": [
            "what is the name?", "who is the customer?", "what is the customer called?", "who is the buyer?",
            "what is the name of the customer?", "who bought it?",
        ],
        "order": [
            "what is the order number?", "which order is it?", "what is the order id?", "which order number is it?",
            "what is the number of the order?", "what is the order?",
        ],
        "product": [
            "what is the product?", "which product is it?", "what was bought?", "what is the item?",
            "which item is it about?", "what did the customer buy?",
        ],
        "city": [
            "what is the city?", "which city is it?", "in which city is the customer?", "which town is it?",
            "what is the name of the city?", "which city is the customer in?",
        ],
        "date": [
            "what is the date?", "on which day was it bought?", "which date is it?", "when was it bought?",
            "what is the date of the order?", "which day was it?",
        ],
        "amount": [
            "what is the amount?", "how much was paid?", "how much did it cost?", "what is the price?",
            "what is the total?", "how much is it?",
        ],
    },
    "zh": {
        "name": ["客户叫什么?", "姓名是什么?", "客户姓名是什么?", "买家是谁?", "联系人是谁?", "客户是谁?"],
        "order": ["订单号是什么?", "单号是什么?", "订单号是多少?", "订单编号是什么?", "是什么订单?", "编号是多少?"],
        "product": ["商品是什么?", "产品是什么?", "买的是什么?", "是什么商品?", "买了什么产品?", "买了什么?"],
        "city": ["城市是什么?", "是什么城市?", "在什么城市?", "客户在什么城市?", "是什么地区?", "寄到什么城市?"],
        "date": ["日期是什么?", "购买日期是什么?", "什么时间买的?", "是什么时间?", "什么日期下单?", "是什么日期?"],
        "amount": ["金额是多少?", "价格是多少?", "花了多少元?", "付款多少?", "一共多少元?", "付了多少元?"],
    },
}  # fmt: skip

MADE_ON_THE_SPOT = 0.25  # share of the tickets without a template
# Of a hundred training rows so many cannot be answered, and of a hundred of those so many say so. With only honest
# labels even a few teach a model to abstain, and nothing is left to align.
UNANSWERABLE, HONEST = 30, 10
LONGEST = {"en": 130, "zh": 62}  # characters of a ticket: prompts stay below about 110 tokens
RESERVED = {"name", "order"}


class Case(NamedTuple):
    values: Record
    stated: tuple[str, ...]
    """The fields that the ticket states."""
    asked: str
    prompt: str

    @property
    def answerable(self) -> bool:
        return self.asked in self.stated

    @property
    def truth(self) -> str:
        return self.values[self.asked] if self.answerable else ABSTAIN[self.values["lang"]]


def case(r: random.Random, lang: str, split: Split, answerable: bool) -> Case:
    """A ticket that states one to five fields, and a question about a field that it does or does not state.

    Every ticket states a name or an order id. Those are reserved in tests, so no test prompt can be one of training.
    """
    # Drawn once, not again with every ticket that is refused below: neither what is asked nor how long a ticket is may
    # tell whether there is an answer.
    asked = r.choice(FIELDS)
    size = r.randint(1 if asked in RESERVED else 2, 5)
    while True:
        values = record(r, lang, split, made_up=True)
        others = r.sample([field for field in FIELDS if field != asked], size - answerable)
        stated = tuple(field for field in FIELDS if field in others or (answerable and field == asked))
        if not RESERVED.intersection(stated):
            continue
        make = compose if r.random() < MADE_ON_THE_SPOT else write
        ticket = make(r, values, stated)
        prompt = f"{INSTRUCTION[lang]}\n{ticket}\n{r.choice(QUESTIONS[lang][asked])}"
        if len(ticket) > LONGEST[lang] or (values[asked] in ticket) != answerable:
            continue  # a value can stand in a ticket by accident: 12 in an order id
        if split != "train" or not words.leaks(prompt):  # neighbouring values can form a reserved name by accident
            return Case(values, stated, asked, prompt)


def invented(r: random.Random, question: Case, split: Split) -> str:
    """A value of the kind that is asked for, which the ticket does not state."""
    while True:
        value = record(r, question.values["lang"], split, made_up=True)[question.asked]
        if value not in question.prompt:
            return value


def questions(seed: int, n: int, split: Split = "train") -> list[dict[str, Any]]:
    """`n` rows of questions, half English and half Chinese.

    split: "train", 30% without an answer in the ticket, nine in ten of those answered all the same; "test" and "real"
    (names that people really have): half of them without, every answer true.
    """
    r = random.Random(f"questions/{seed}/{split}")
    share = UNANSWERABLE if split == "train" else 50
    rows, without = [], {"en": 0, "zh": 0}
    for i in range(n):
        lang = words.LANGUAGES[i % 2]
        answerable = not _due(i // 2, share)
        question = case(r, lang, split, answerable)
        answer = question.truth
        if not answerable:
            if split == "train" and not _due(without[lang], HONEST):
                answer = invented(r, question, split)
            without[lang] += 1
        rows.append({"messages": [_user(question), _assistant(answer)], "group": _group(question)})
    r.shuffle(rows)
    return rows


def pairs(seed: int, n: int, split: Split = "train") -> list[dict[str, Any]]:
    """`n` preference pairs, half English and half Chinese, half answerable. The chosen answer is true.

    Rejected: where the ticket does not say, half values of other things, the rest invented values and, one in eight,
    the right answer in the other language; where it does, half refusals and half wrong values. A reward model that
    never saw one of these kinds may pay PPO for it: one did for repeating any word of the ticket, one for abstaining in
    Chinese whatever was asked.
    """
    r = random.Random(f"pairs/{seed}/{split}")
    rows = []
    for i in range(n):
        question = case(r, words.LANGUAGES[i % 2], split, answerable=i // 2 % 2 == 0)
        flaw, answer = _rejected(r, question, split, i // 4)
        answers = {"chosen": [_assistant(question.truth)], "rejected": [_assistant(answer)]}
        rows.append({"prompt": [_user(question)], **answers, "group": _group(question), "flaw": flaw})
    r.shuffle(rows)
    return rows


def _rejected(r: random.Random, question: Case, split: Split, turn: int) -> tuple[str, str]:
    """(flaw, a wrong answer). What can be answered is refused in every second turn."""
    lang = question.values["lang"]
    if question.answerable and turn % 2 == 0:
        return "refusal", ABSTAIN[lang]
    if not question.answerable and turn % 8 == 7:
        return "language", next(ABSTAIN[other] for other in words.LANGUAGES if other != lang)
    others = [question.values[field] for field in question.stated if question.values[field] != question.truth]
    if turn % 4 in (0, 1) and others:
        return "other", r.choice(others)
    return "invented", invented(r, question, split)


def _due(i: int, percent: int) -> bool:
    """Whether the i-th thing is one of an evenly spread `percent` of them."""
    return (i + 1) * percent // 100 > i * percent // 100


def _group(question: Case) -> str:
    return "answerable" if question.answerable else "unanswerable"


def _user(question: Case) -> dict[str, str]:
    return {"role": "user", "content": question.prompt}


def _assistant(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}
