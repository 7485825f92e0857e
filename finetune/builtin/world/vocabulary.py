"""The words of the world: values of a ticket's fields, and which of them are reserved for tests.

Reservation works by prefix, so that a reserved name is not even the beginning of a name seen in training:
    English names   the first three letters     Tom -> Tom, Toma, Tomas
    Chinese names   the first two characters    王伟 -> 王伟, 王伟明
    order ids       last letter + three digits  QA123 -> A123…, QA1234, A12345
`leaks(text)` finds reserved values in any text; pre-training documents and training rows pass it.
"""

import random
import re
import zlib
from collections.abc import Callable
from functools import cache

from finetune.builtin.world.phrasings import CLAUSES, CUES, FILLERS, FULL, LABELS, PAIRS, SMALL_TALK

LANGUAGES = ("en", "zh")

# Never in training in any form: the probe for names that people really have.
REAL_NAMES = (  # noqa: SIM905
    "Alice Bob David Emma Frank Grace Irene Jack Karen Leo Noah Olivia Peter Quinn Rose Sam Tina Uma Victor "
    "Wendy Xavier Yara Zoe Aaron Bella Chloe Dylan Ethan Fiona George Isaac Kevin Laura Nina Oscar Lucas"
).split()
SURNAMES = "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧"
GIVEN = (
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华文斌宇浩凯晨梅玲建国红志春雪峰龙飞云波兰婷佳欣怡然子轩博嘉思雨梦琪"
)

# fmt: off
PRODUCTS = [
    ("kettle", "电热水壶"), ("desk lamp", "台灯"), ("backpack", "双肩包"), ("keyboard", "键盘"), ("monitor", "显示器"),
    ("headphones", "耳机"), ("coffee mug", "咖啡杯"), ("office chair", "办公椅"), ("rice cooker", "电饭煲"),
    ("fan", "电风扇"), ("printer", "打印机"), ("router", "路由器"), ("blender", "榨汁机"), ("toaster", "烤面包机"),
    ("camera", "相机"), ("tablet", "平板电脑"), ("phone case", "手机壳"), ("yoga mat", "瑜伽垫"), ("umbrella", "雨伞"),
    ("water bottle", "水杯"), ("suitcase", "行李箱"), ("sneakers", "运动鞋"), ("jacket", "夹克"), ("scarf", "围巾"),
]
ADJECTIVES = [
    ("red", "红色"), ("blue", "蓝色"), ("small", "小号"), ("large", "大号"), ("black", "黑色"), ("white", "白色"),
    ("folding", "折叠"), ("cotton", "棉质"), ("metal", "金属"), ("wooden", "木质"), ("green", "绿色"), ("mini", "迷你"),
]
CITIES = [
    ("Beijing", "北京"), ("Shanghai", "上海"), ("Chengdu", "成都"), ("Wuhan", "武汉"), ("Xian", "西安"),
    ("Hangzhou", "杭州"), ("Nanjing", "南京"), ("Shenzhen", "深圳"), ("Tianjin", "天津"), ("Suzhou", "苏州"),
    ("Qingdao", "青岛"), ("Xiamen", "厦门"), ("Changsha", "长沙"), ("Kunming", "昆明"), ("Harbin", "哈尔滨"),
    ("Dalian", "大连"),
]
# (English, Chinese, what a customer says in English, in Chinese)
CATEGORIES: list[tuple[str, str, list[str], list[str]]] = [
    ("damaged", "损坏", ["arrived broken", "was damaged on arrival", "came with a crack"],
     ["到货时已损坏", "收到就是破的", "外壳有裂痕"]),
    ("late", "延迟", ["is late", "has not arrived yet", "is still on the way"],
     ["迟迟没有送到", "还没收到", "一直在路上"]),
    ("wrong_item", "发错", ["is the wrong colour", "is the wrong size", "is not what I ordered"],
     ["颜色发错了", "尺寸不对", "和订单不一样"]),
    ("missing_part", "缺件", ["is missing a part", "came without the cable", "lacks two screws"],
     ["缺少配件", "少了一根线", "没有说明书"]),
    ("defective", "故障", ["stopped working", "does not turn on", "makes a strange noise"],
     ["用了几天就坏了", "打不开", "有很大的噪音"]),
]
# fmt: on
# A place is known by how it begins, as a Chinese name is by its surname: a model that reads from left to right must
# decide at the first letters whether to copy, and cannot know there how a word will end.
PLACES = ("Port", "Lake", "Fort", "Mount", "Cape", "Glen", "Saint", "Bay")
MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905

# Onsets, vowels and codas of made-up words; what stands twice is drawn twice as often.
_ONSETS = [*"bcdfghjklmnprstvwyz", "sh", "ch", "th", "br", "cl", "cr", "dr", "fl", "fr", "gr", "gl"]
_ONSETS += ["kr", "pl", "pr", "qu", "sl", "st", "tr", "wh", "kn"]
_VOWELS = [*"aeiouaeiou", "ai", "ea", "ee", "ia", "ie", "io", "y", "ey", "au", "oo"]
_CODAS = ["", "", "", "", *"nrlsmtdkx", "ck", "ll", "nn", "ss", "tt", "rd", "nd", "rt", "ne", "ce", "th", "na"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CAPITALS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def english_word(r: random.Random) -> str:
    """A made-up lower-case word of 3-10 letters: mostly pronounceable, sometimes any letters."""
    if r.random() < 0.12:
        return "".join(r.choices(_LETTERS, k=r.randint(3, 6)))
    start = r.choice(_VOWELS[:10]) + r.choice(_CODAS) if r.random() < 0.25 else ""
    syllables = r.choice((1, 1, 2)) if start else r.choice((1, 2, 2, 3))
    word = start + "".join(r.choice(_ONSETS) + r.choice(_VOWELS) for _ in range(syllables)) + r.choice(_CODAS)
    return word[:10] if len(word) > 2 else word + r.choice("nrlsm")


def english_name(r: random.Random, reserved: bool, surnames: bool = False) -> str:
    """One made-up word; `surnames`: with a second one behind every eighth."""

    def word() -> str:
        return draw(lambda: english_word(r).capitalize(), reserved)

    return f"{word()} {word()}" if surnames and r.random() >= 0.88 else word()


def chinese_name(r: random.Random, reserved: bool) -> str:
    given = r.choice((1, 2, 2))
    return draw(lambda: r.choice(SURNAMES) + "".join(r.choice(GIVEN) for _ in range(given)), reserved)


def order_id(r: random.Random, reserved: bool) -> str:
    """One or two capitals and four or five digits."""
    letters, digits = r.choice((1, 1, 2)), r.choice((4, 4, 5))
    return draw(lambda: "".join(r.choices(_CAPITALS, k=letters) + r.choices("0123456789", k=digits)), reserved)


def product(r: random.Random, lang: str) -> str:
    noun, adjective = r.choice(PRODUCTS), r.choice(ADJECTIVES)
    if r.random() < 0.4:
        return noun[lang == "zh"]
    return f"{adjective[0]} {noun[0]}" if lang == "en" else adjective[1] + noun[1]


def made_up_city(r: random.Random, lang: str) -> str:
    if lang == "en":
        return f"{r.choice(PLACES)} {english_word(r).capitalize()}"
    return "".join(r.choice(GIVEN) for _ in range(2)) + r.choice("市县镇")


def date(r: random.Random, lang: str) -> str:
    """As people write it; the answer repeats it letter by letter."""
    month, day = r.randint(1, 12), r.randint(1, 28)
    if r.random() < 0.2:
        return f"{r.randint(2019, 2026)}-{month:02d}-{day:02d}"
    return f"{MONTHS[month - 1]} {day}" if lang == "en" else f"{month}月{day}日"


def amount(r: random.Random) -> str:
    whole = str(r.randint(10, 999) if r.random() < 0.7 else r.randint(1000, 9999))
    return whole if r.random() < 0.9 else f"{whole}.{r.randint(1, 99):02d}"


_REAL_PREFIXES = frozenset(name[:3] for name in REAL_NAMES)
_ENGLISH = re.compile(r"[A-Z][a-z]+")
_CHINESE = re.compile(f"(?=([{SURNAMES}][{GIVEN}]))")
_ORDER = re.compile(r"[A-Z]\d{3}")


@cache
def _public_prefixes() -> frozenset[str]:
    """Beginnings of ordinary words: Order, Customer, Beijing… can never be reserved."""
    texts = [t for table in (CLAUSES, CUES, PAIRS, LABELS) for per in table.values() for ts in per.values() for t in ts]
    texts += [t for table in (FULL, SMALL_TALK) for ts in table.values() for t in ts]
    texts += [*MONTHS, *PLACES, *(en for en, _ in CITIES), *(word.capitalize() for word in FILLERS["en"])]
    return frozenset(word[:3] for text in texts for word in _ENGLISH.findall(text))


@cache
def _reserved_prefix(prefix: str) -> bool:
    """One in eight; crc32 is the same on every machine and in every Python."""
    drawn = zlib.crc32(prefix.encode()) % 8 == 0
    return prefix in _REAL_PREFIXES or (drawn and prefix not in _public_prefixes())


def leaks(text: str) -> list[str]:
    """The reserved prefixes of names and order ids that occur anywhere in `text`."""
    found = [m.group()[:3] for m in _ENGLISH.finditer(text)]
    found += [m.group(1) for m in _CHINESE.finditer(text)]
    found += _ORDER.findall(text)
    return [prefix for prefix in found if _reserved_prefix(prefix)]


def draw(make: Callable[[], str], reserved: bool) -> str:
    """Repeat `make()` until the value is reserved (tests) or is not (training)."""
    while True:
        value = make()
        if bool(leaks(value)) == reserved:
            return value
