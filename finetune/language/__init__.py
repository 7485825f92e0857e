"""Help, errors and notes in Chinese: `FT_LANG=zh`, or a locale that begins with zh.

The English text is the key. `zh.json` holds for each template (`unknown dtype {0}`) the Chinese one; a text is held
against them where it is shown, and nowhere else: files, JSON and logs stay English. Of a template {0}, {1}, … are
values and stay as they are; {a}, {b}, … are texts that have entries of their own. What has no entry is shown in English
as a whole. `tools/zh_catalogue.py` reads all templates from the source and says which are missing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path

from finetune.language.agreeing import UNITS, agreed

LANGUAGES = ("zh", "en")
VARIABLE = "FT_LANG"
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")
"""The first that is set decides, as everywhere."""
CATALOGUE = Path(__file__).parent / "zh.json"
HOLE = re.compile(r"\{(\w)\}")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
SENTENCE = re.compile(r"\b(a|an|and|are|has|in|is|it|its|not|of|or|that|the|to|was|which|with)\b")
LONGEST, DEEPEST, PLACES = 4000, 4, 20  # what is longer, or in more parts, is no message of ours
COUNTED = re.compile(rf" (?:{UNITS})")
FEW = 10
"""Letters of a template that says so little (`use {0}`) that a sentence we do not know would pass for its value."""


def named(text: str) -> str:
    """The language of `zh`, `zh_CN.UTF-8`, `zh-Hans`."""
    return re.split(r"[-_.@]", text.strip().lower())[0]


def unknown() -> str | None:
    """What FT_LANG says where that is no language we have."""
    given = os.environ.get(VARIABLE, "")
    return given if given.strip() and named(given) not in LANGUAGES else None


def chinese() -> bool:
    """Whether to show Chinese: asked for, and the terminal can."""
    given = os.environ.get(VARIABLE, "")
    if not given.strip():
        given = next((value for name in LOCALE if (value := os.environ.get(name))), "")
    if named(given) != "zh":
        return False
    try:
        "中".encode(getattr(sys.stderr, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@dataclass(frozen=True)
class Template:
    literals: tuple[str, ...]
    """What stands between the holes."""
    holes: tuple[str, ...]
    chinese: str
    letters: int
    """How much it says of itself; a frame of other texts says nothing."""
    texts: int
    """Holes that have entries of their own."""
    counts: bool
    """`{0} weights`: the value is a number, and `original weights` is another text."""

    @classmethod
    def of(cls, parts: list[str], chinese: str) -> Template:
        literals, holes = tuple(map(braces, parts[::2])), tuple(parts[1::2])
        letters = sum(character.isalpha() for literal in literals for character in literal)
        counts = parts[0] == "" and COUNTED.fullmatch(parts[-1]) is not None and len(parts) == 3
        return cls(literals, holes, chinese, letters, sum(map(str.isalpha, holes)), counts)

    def fits(self, text: str) -> Iterator[dict[str, str]]:
        """Hole -> what stands there in `text`; of a frame of two texts every place where the second may begin."""
        first, *between, last = self.literals
        at, end = len(first), len(text) - len(last)
        if at > end or not (text.startswith(first) and text.endswith(last)):
            return
        if not self.letters and len(between) == 1:
            for found in islice(re.finditer(re.escape(between[0]), text[at:end]), PLACES):
                yield dict(zip(self.holes, (text[at : at + found.start()], text[at + found.end() : end]), strict=True))
            return
        values = []
        for literal in between:
            if (begin := text.find(literal, at, end)) < 0:
                return
            values.append(text[at:begin])
            at = begin + len(literal)
        yield dict(zip(self.holes, [*values, text[at:end]], strict=True))

    def shown(self, text: str, deep: int) -> tuple[str, bool] | None:
        """`text` in Chinese, where it is made of this template, and whether all its parts are."""
        deep = deep + 1 if self.letters else DEEPEST  # no frame within a frame
        for values in self.fits(text):
            known = {name: in_chinese(value, deep) if name.isalpha() else value for name, value in values.items()}
            left = [name for name in values if known[name] == values[name]]
            unsure = self.letters <= FEW and any(is_sentence(values[name]) for name in left)
            unsure = unsure or (self.counts and not any(map(str.isdigit, values["0"])))
            whole = not any(map(str.isalpha, left))
            if not unsure and (self.letters or whole):
                return filled(self.chinese, known), whole
        return None


def is_sentence(value: str) -> bool:
    """Whether a value, or a part of a list, reads like a sentence of ours."""
    return any(" " in part and SENTENCE.search(part) for part in QUOTED.sub("", value).split(", "))


def braces(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


@cache
def catalogue() -> dict[str, str]:
    found: dict[str, str] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return found


@cache
def templates() -> list[Template]:
    """Those with holes; the ones that say most of themselves first."""
    split = ((HOLE.split(english), translation) for english, translation in catalogue().items())
    found = [Template.of(parts, translation) for parts, translation in split if len(parts) > 1]
    return sorted(found, key=lambda template: (template.letters, template.texts), reverse=True)


def translated(text: str) -> str:
    """The text to show: Chinese where that is asked for and the text is known."""
    return agreed(in_chinese(text) if text and chinese() else text)


@lru_cache(maxsize=4096)
def in_chinese(text: str, deep: int = 0) -> str:
    """`deep`: in how many texts it stands."""
    if (known := catalogue().get(text.replace("{", "{{").replace("}", "}}"))) is not None:
        return braces(known)
    partly = None
    for template in templates() if len(text) < LONGEST else ():
        if deep >= DEEPEST and not template.letters:
            break  # frames come last
        if deep <= DEEPEST and (found := template.shown(text, deep)) is not None:
            shown, whole = found
            if whole:
                return shown
            partly = partly or shown
    return partly or text


def filled(template: str, values: dict[str, str]) -> str:
    parts = HOLE.split(template)
    return "".join(values[part] if i % 2 else braces(part) for i, part in enumerate(parts))
