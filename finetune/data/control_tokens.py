"""Control tokens in content stay text: a user who writes `<|im_end|>` must not be able to end a turn.

A private-use character, the mark, goes into every control token's string before the template renders it; the tokens
are then taken of the marked text. Where nothing needs it, nothing is touched.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from finetune.data.offsets import Pieces
from finetune.data.templates import EDGES
from finetune.data.types import RowProblem

NAMED = re.compile(r"[<\[].+[>\]]", re.DOTALL)
TURN_MARK = re.compile(r"<\|.*\|>|<｜.*｜>|<(start|end)_of_turn>|\[/?INST\]", re.DOTALL)


def unused(text: str, count: int) -> str:
    """That many private-use characters that do not occur in `text`."""
    free = (char for char in map(chr, range(0xF8FF, 0xDFFF, -1)) if char not in text)
    return "".join(itertools.islice(free, count))


def all_strings(value: Any) -> str:
    """Every string inside `value`, keys included, in one."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join([all_strings(item) for pair in value.items() for item in pair])
    return "\n".join(map(all_strings, value)) if isinstance(value, list) else ""


def backend_of(tokenizer: Any, as_text: bool = False) -> Any:
    """The fast tokenizer itself, which adds and cuts nothing; `as_text` does not recognise control tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = as_text
    return backend


class Guard:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        control = {t.content for t in added if t.special or TURN_MARK.fullmatch(t.content)}
        control |= {t for t in getattr(tokenizer, "all_special_tokens", []) if t.strip()}
        # <think>, <tool_call> and the like belong to the assistant and to instructions, never to users and tools. Words
        # and letters that were added to a vocabulary are text for everyone.
        named = {t.content for t in added if NAMED.fullmatch(t.content)} - control
        self.control, self.all_added = pattern(control), pattern(control | named)
        self.any = pattern(control | named | set(EDGES))
        # Tokens that are looked for in normalised text can be written in other ways (＜｜im_end｜＞ under NFKC).
        backend = getattr(tokenizer, "backend_tokenizer", None)
        loose = any(t.normalized and t.content in control for t in added)
        self.normalise = backend.normalizer.normalize_str if loose and backend and backend.normalizer else None
        self.eats_left = {t.content for t in added if t.lstrip}
        self.eats_right = {t.content for t in added if t.rstrip}
        self.anchor_ids: list[int] = []
        self.prefixes = self._prefixes()
        # The backend's switch against control tokens leaves those that are added but not special; they are cut apart.
        self.soft = [t.content for t in added if not t.special and t.content in control | named]

    def pattern_for(self, role: str | None) -> re.Pattern[str]:
        return self.all_added if role in ("user", "tool") else self.control

    def disguised(self, text: str) -> list[str]:
        """Control tokens that appear when the tokenizer normalises the text."""
        return [] if self.normalise is None else self.control.findall(self.normalise(text))

    def suspicious(self, text: str) -> bool:
        """Whether `text` must be looked at closely; no for nearly all."""
        return self.any.search(text) is not None or bool(self.disguised(text))

    def found(self, value: Any, role: str | None = None) -> list[str]:
        """The control tokens written out anywhere inside `value`."""
        if isinstance(value, str):
            return self.pattern_for(role).findall(value) or self.disguised(value)
        if isinstance(value, dict):
            return [hit for k, v in value.items() for hit in (*self.found(k, role), *self.found(v, role))]
        if isinstance(value, list):
            return [hit for item in value for hit in self.found(item, role)]
        return []

    def mark(self, value: Any, mark: str, role: str | None = None) -> Any:
        """`value` with `mark` after the first character of every control token, in keys, too."""
        if isinstance(value, str):
            if self.disguised(value):
                return value[0] + mark + value[1:]  # one mark is enough to have the whole part encoded as text
            return self.pattern_for(role).sub(lambda hit: hit[0][0] + mark + hit[0][1:], value)
        if isinstance(value, dict):
            return {self.mark(k, mark, role): self.mark(v, mark, role) for k, v in value.items()}
        if isinstance(value, list):
            return [self.mark(item, mark, role) for item in value]
        return value

    def tokens(self, text: str, mark: str) -> Pieces:
        """The tokens of a marked text; their places are places in `text`.

        The text is cut at the control tokens that are left, which are the template's. A part between two of them that
        carries marks is encoded without the marks and without recognising control tokens; all else as usual.
        """
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            what = "control tokens written inside content, which this slow tokenizer cannot keep apart"
            raise RowProblem("forged_control_token", what, "use the fast version of the tokenizer, or remove the row")
        soft = re.compile("|".join(f"(?<={re.escape(t[0])}){mark}(?={re.escape(t[1:])})" for t in self.soft) or "(?!)")
        out = Pieces([], [])
        waiting, at = 0, 0  # text[waiting:at] is to be encoded as usual
        # A token of one character is marked behind.
        pieces = re.split(f"((?:{self.all_added.pattern})(?!{mark}))", text)
        for number, piece in enumerate(pieces):
            if mark in piece:
                self._encode(out, text, waiting, at, mark, False)
                before, after = pieces[number - 1] if number else "", "".join(pieces[number + 1 : number + 2])
                start = at + (len(piece) - len(piece.lstrip()) if before in self.eats_right else 0)
                end = at + (len(piece.rstrip()) if after in self.eats_left else len(piece))
                for part in cut(text[start:end], soft):
                    self._encode(out, text, start, start + len(part), mark, True)
                    start += len(part)
                waiting = at + len(piece)
            at += len(piece)
        self._encode(out, text, waiting, at, mark, False)
        return out

    def _encode(self, out: Pieces, text: str, start: int, end: int, mark: str, as_text: bool) -> None:
        """Append the tokens of text[start:end]."""
        if start >= end:
            return
        plain, places = strip_marks(text[start:end], mark, start)
        backend = backend_of(self.tokenizer, as_text)
        anchor = ANCHOR if as_text and start and self.prefixes else ""
        try:
            encoding = backend.encode(anchor + plain, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        skip, shift = len(self.anchor_ids) if anchor else 0, len(anchor)
        out.ids += encoding.ids[skip:]
        for a, b in encoding.offsets[skip:]:
            first = places[max(a - shift, 0)]
            out.offsets.append((first, places[b - shift - 1] + 1 if b - shift > max(a - shift, 0) else first))

    def _prefixes(self) -> bool:
        """Whether text at the very beginning is encoded unlike text behind a control token (SentencePiece's "▁")."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = next((t.content for t in added if t.special and t.content), None)
        if special is None or getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return False
        backend = backend_of(self.tokenizer)
        ids = [backend.encode(part, add_special_tokens=False).ids for part in (f"{special}ab", special, "ab", ANCHOR)]
        self.anchor_ids = ids[3]
        return ids[0] != ids[1] + ids[2]


ANCHOR = "\n"  # stands before a part that is no beginning, and is taken away again


def cut(piece: str, where: re.Pattern[str]) -> list[str]:
    """`piece` in parts that begin at each match; nothing for an empty piece."""
    places = [0, *(hit.start() for hit in where.finditer(piece)), len(piece)]
    return [piece[a:b] for a, b in itertools.pairwise(places) if b > a]


def strip_marks(piece: str, mark: str, start: int) -> tuple[str, list[int]]:
    """The text without marks, and for each of its characters (and its end) the position in the marked text."""
    places = [start + i for i, char in enumerate(piece) if char != mark]
    return piece.replace(mark, ""), [*places, start + len(piece)]


def pattern(tokens: set[str]) -> re.Pattern[str]:
    # Longest first, so that a token is not cut where a shorter one begins like it.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda t: (-len(t), t)))) or "(?!)")
