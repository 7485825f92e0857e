"""Answers against references as texts: Chinese character by character, other text word by word. No torch."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

# Characters that stand without spaces: Chinese, and Japanese kana.
HAN = "々〇\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")
WORD = re.compile(rf"[{HAN}]|[^\s{HAN}]+")
CHINESE = re.compile(rf"[{HAN}]")


def exact_match(prediction: str, reference: str) -> bool:
    """Equal up to white space at both ends."""
    return prediction.strip() == reference.strip()


# --- normalised ---

# A sign before a number and what stands inside one belong to it: -5 is not 5, 3.5 is not 35.
KEPT = re.compile(r"(?<!\w)[-−+](?=\d)|(?<=\d)[.,:/](?=\d)")
SPACES = re.compile(rf"(?<=[{HAN}])\s+|\s+(?=[{HAN}])")


def normalised(text: str) -> str:
    """Without case, width (NFKC), punctuation, and spaces but for one between words; all punctuation stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = {found.start() for found in KEPT.finditer(folded)}
    letters = []
    for place, letter in enumerate(folded):
        if place not in kept and unicodedata.category(letter).startswith("P"):
            letter = "" if letter in "'’" else " "
        letters.append(letter)
    bare = " ".join(SPACES.sub("", "".join(letters)).split())
    return bare or " ".join(folded.split())


def normalised_match(prediction: str, reference: str) -> bool:
    return normalised(prediction) == normalised(reference)


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words, or Chinese characters, of the normalised texts, each counted as often as it occurs."""
    return f1(*overlap(WORD.findall(normalised(prediction)), WORD.findall(normalised(reference))))


def overlap(a: Sequence[object], b: Sequence[object]) -> tuple[int, int, int]:
    """(how many are in both, in a, in b)"""
    return (Counter(a) & Counter(b)).total(), len(a), len(b)


def f1(both: int, a: int, b: int) -> float:
    """Two empty sides are the same."""
    return 2 * both / (a + b) if a + b else 1.0


# --- ROUGE ---


def grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def rouge(n: int) -> Callable[[str, str], float]:
    """F1 of n-grams (n = 0: of the longest common subsequence, ROUGE-L), as Google's rouge-score computes it without
    stemming, but that letters outside of ASCII count and Chinese characters are words."""

    def score(prediction: str, reference: str) -> float:
        a, b = TOKEN.findall(prediction.lower()), TOKEN.findall(reference.lower())
        if not (a and b):
            return 0.0
        found = (common_subsequence(a, b), len(a), len(b)) if n == 0 else overlap(grams(a, n), grams(b, n))
        return f1(*found) if found[0] else 0.0

    return score


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest one, all cells of a row at once as bits of a number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for token in b:
        hits = row & places.get(token, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def rouge_jieba(n: int) -> Callable[[str, str], float]:
    """ROUGE as ChatGLM's fine-tuning demo and LLaMA-Factory report it (there times 100): words are jieba's, with
    punctuation and case, and every n-gram counts once however often it occurs; of ROUGE-L all words count."""

    def score(prediction: str, reference: str) -> float:
        a, b = jieba_words(prediction), jieba_words(reference)
        if not (a and b):
            return 0.0
        if n == 0:
            both, left, right = common_subsequence(a, b), len(a), len(b)
        else:
            one, other = set(grams(a, n)), set(grams(b, n))
            both, left, right = len(one & other), len(one), len(other)
        return f1(both, left, right) if both else 0.0

    return score


@lru_cache(maxsize=4096)
def jieba_words(text: str) -> list[str]:
    return " ".join(jieba_package().cut(text)).split()


@lru_cache
def jieba_package() -> Any:
    import logging
    import warnings

    with warnings.catch_warnings():  # jieba 0.42 is older than Python's rules for escapes, and asks for pkg_resources
        warnings.simplefilter("ignore")
        import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba


def character_bleu4(prediction: str, reference: str) -> float:
    """BLEU-4 of characters of one row, smoothed as NLTK's method 3: what LLaMA-Factory calls bleu-4 (there times 100).

    A precision without a hit is 1 / (2^k * its n-grams) for the k-th such one (Chen & Cherry 2014).
    """
    a, b = list(prediction), list(reference)
    if not a or not set(a) & set(b):
        return 0.0
    logs, missing = 0.0, 0
    for n in range(1, 5):
        both, total, _ = overlap(grams(a, n), grams(b, n))
        missing += not both
        logs += math.log((both or 2.0**-missing) / max(total, 1))
    short = 1.0 if len(a) > len(b) else math.exp(1 - len(b) / len(a))
    return short * math.exp(logs / 4)
