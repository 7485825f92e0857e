"""Test prompts that were seen in training: exactly, up to case and spacing, or nearly.

Nearly means that most of a held-out prompt's passages stand in one training prompt. A passage is a window of 24 bytes
(8 Chinese characters, about 5 English words) after case, spacing and ASCII punctuation are taken away; one in two is
kept, chosen by its hash, so that both sides keep the same. Passages that stand in more than 50 held-out prompts are a
template's and count for nothing. Windows are computed for whole batches with numpy, and the time grows with the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from finetune.data import checks, choices
from finetune.data.samples import Item, read_samples, specs
from finetune.data.types import Sample
from finetune.recipe.sections import DataConfig

WINDOW = 24
KEPT = 2  # one window in this many
NEAR = 0.8  # share of a held-out prompt's windows that must stand in one training prompt
SIEVE = 1 << 20
COMMON = 50  # held-out prompts: a window that stands in more says nothing, and would be compared with all of them
FEWEST = 4  # windows a prompt needs to be compared by them; shorter ones only exactly

_FOLD = np.zeros(256, np.uint8)  # byte -> itself in lower case, 0 for what is left out
_FOLD[128:] = np.arange(128, 256)
for _char in b"0123456789abcdefghijklmnopqrstuvwxyz":
    _FOLD[_char] = _char
    _FOLD[ord(chr(_char).upper())] = _char
_RANDOM = np.random.default_rng(0).integers(1, 2**63, 256, dtype=np.uint64) | np.uint64(1)
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def folded(text: str) -> int:
    """Equal for texts that differ only in case and spacing. For one run (Python's own hash)."""
    return hash("".join(text.lower().split()))


def windows(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, number of the text each belongs to) of the kept windows of all texts."""
    raw = np.frombuffer("\n".join(texts).encode("utf-8", "surrogatepass"), np.uint8)
    sizes = np.array([len(t) if t.isascii() else len(t.encode("utf-8", "surrogatepass")) for t in texts], np.int64)
    owner = np.repeat(np.arange(len(texts)), sizes + 1)[: len(raw)]
    letters = _FOLD[raw]
    used = letters > 0
    letters, owner = letters[used], owner[used]
    if len(letters) < WINDOW:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        one = _RANDOM[letters]
        two = one[:-1] * _PRIME + one[1:]
        four = two[:-2] * _PRIME + two[2:]
        eight = four[:-4] * _PRIME + four[4:]
        sixteen = eight[:-8] * _PRIME + eight[8:]
        hashes = sixteen[:-8] * _PRIME + eight[16:]
    inside = owner[: len(hashes)] == owner[WINDOW - 1 :]
    kept = inside & ((hashes >> np.uint64(40)) % np.uint64(KEPT) == 0)
    return hashes[kept], owner[: len(hashes)][kept]


def without_common(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows that stand in few texts, sorted by hash."""
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    other = np.ones(len(hashes), bool)  # than the one before it: a text counts once for a window
    other[1:] = (hashes[1:] != hashes[:-1]) | (owners[1:] != owners[:-1])
    distinct, texts = np.unique(hashes[other], return_counts=True)
    rare = ~np.isin(hashes, distinct[texts > COMMON])
    return hashes[rare], owners[rare]


class Index:
    def __init__(self, prompts: Sequence[str], questions: Sequence[str] = ()) -> None:
        """questions: `Sample.questions` of the same rows."""
        self.questions: dict[str, int] = {}
        for row, question in enumerate(questions):
            if question:
                self.questions.setdefault(question, row)
        self.exact: dict[int, int] = {}
        for row, prompt in enumerate(prompts):
            self.exact.setdefault(folded(prompt), row)
        hashes, owners = without_common(*windows(prompts))
        self.sizes = np.bincount(owners, minlength=len(prompts))
        self.hashes, self.owners = hashes, owners
        self.sieve = np.zeros(SIEVE, bool)  # most windows of most rows are in no held-out row: seen without a search
        self.sieve[hashes & np.uint64(SIEVE - 1)] = True

    def search(self, prompts: Sequence[str]) -> list[tuple[int, int, float]]:
        """(row of `prompts`, held-out row, similarity) of the best match of each row that leaks; 1.0 is exact."""
        found = {
            row: (match, 1.0)
            for row, prompt in enumerate(prompts)
            if (match := self.exact.get(folded(prompt))) is not None
        }
        for row, match, similarity in self.near(prompts):
            if found.get(row, (0, 0.0))[1] < similarity:
                found[row] = (match, similarity)
        return [(row, match, similarity) for row, (match, similarity) in sorted(found.items())]

    def near(self, prompts: Sequence[str]) -> list[tuple[int, int, float]]:
        """(row of `prompts`, held-out row, similarity, at most 0.99) of all that are nearly the same."""
        hashes, rows = windows(prompts)
        likely = self.sieve[hashes & np.uint64(SIEVE - 1)]
        hashes, rows = hashes[likely], rows[likely]
        first = np.searchsorted(self.hashes, hashes, "left")
        count = np.searchsorted(self.hashes, hashes, "right") - first
        hit = count > 0
        if not hit.any():
            return []
        rows, first, count = rows[hit], first[hit], count[hit]
        at = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) + np.arange(count.sum())
        pairs = np.unique(np.stack([np.repeat(rows, count), self.owners[at], at]), axis=1)
        (train, held), matches = np.unique(pairs[:2], axis=1, return_counts=True)
        share = np.minimum(matches / self.sizes[held], 0.99)
        near = (share >= NEAR) & (self.sizes[held] >= FEWEST)
        return list(zip(train[near].tolist(), held[near].tolist(), share[near].tolist(), strict=True))

    def every(self, samples: Sequence[Sample]) -> list[tuple[int, int, float]]:
        """(row of `samples`, held-out row, similarity) of all pairs, of held-out rows with equal prompts the first;
        similarities as in `matches`."""
        prompts = [sample.prompt_text for sample in samples]
        found = {(row, match): share for row, match, share in self.near(prompts)}
        for row, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
            if (match := self.questions.get(sample.questions)) is not None:
                found.setdefault((row, match), 0.0)
            if (match := self.exact.get(folded(prompt))) is not None:
                found[row, match] = 1.0
        return [(row, match, share) for (row, match), share in found.items()]

    def matches(self, samples: Sequence[Sample]) -> dict[int, tuple[int, float]]:
        """{row of `samples`: (held-out row, similarity)}; 0.0 where only the question is the same, under another system
        turn."""
        found = {row: (match, share) for row, match, share in self.search([s.prompt_text for s in samples])}
        for row, sample in enumerate(samples):
            match = self.questions.get(sample.questions)
            if match is not None:
                found.setdefault(row, (match, 0.0))
        return found


def held_items(spec: Any, section: DataConfig) -> Iterable[Item]:
    """The rows of a source as they are evaluated: questions of multiple choice, or samples."""
    if not choices.is_choices(spec["path"]):
        return read_samples(spec, section, None)
    sheets = choices.evaluated(str(spec["path"]))
    return [Item(q.file, q.row, q.sample) for one in sheets for q in choices.read(one.path)]


class HeldOut:
    """The rows of a data section, looked for in training rows; warnings name their places."""

    def __init__(self, section: DataConfig) -> None:
        items = [i for spec in specs(section) for i in held_items(spec, section) if i.sample is not None]
        self.places = [f"{item.file}, row {item.row}" for item in items]
        self.index = Index([i.usable.prompt_text for i in items], [i.usable.questions for i in items])

    def findings(self, samples: Sequence[Sample]) -> Iterator[tuple[int, checks.Finding]]:
        for row, (match, similarity) in sorted(self.index.matches(samples).items()):
            place = self.places[match]
            if similarity:
                how = "is in the held-out data" if similarity == 1 else f"is {similarity:.0%} in the held-out data"
                fix = "take it out of one of the two"
                yield row, checks.warning("leakage", f"the prompt {how} ({place})", fix)
            else:
                what = f"the question is in the held-out data ({place}), under another system turn"
                yield row, checks.warning("same_question", what)
