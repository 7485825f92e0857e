"""Where tokens stand in a text, whatever the tokenizer tells of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune.data.types import RowProblem


class Tokens(Protocol):
    """What a tokenizers.Encoding offers of itself."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...
    def char_to_token(self, char: int) -> int | None: ...
    def token_to_chars(self, token: int) -> tuple[int, int]: ...


@dataclass(slots=True)
class Pieces:
    """Tokens that were encoded piece by piece."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def char_to_token(self, char: int) -> int | None:
        return None

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.offsets[token]


class ByLength:
    """Tokens of a tokenizer that does not tell where they stand: found by encoding the text before a place."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.ids: list[int] = tokenizer.encode(text, add_special_tokens=False)

    def char_to_token(self, char: int) -> int:
        before = self.tokenizer.encode(self.text[:char], add_special_tokens=False)
        if self.ids[: len(before)] != before:
            what = "this tokenizer joins the end of a turn's header with the reply: no safe label mask"
            raise RowProblem("slow_tokenizer", what, "use the fast version of the tokenizer")
        self.place = char
        return len(before)

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.place, self.place + 1

    @property
    def offsets(self) -> list[tuple[int, int]]:
        raise NotImplementedError


def first_from(tokens: Tokens, char: int) -> int:
    """Number of the first token that begins at `char` or later."""
    token = tokens.char_to_token(char)
    if token is None:  # white space that its token does not own, or the end
        return bisect_left([start for start, _ in tokens.offsets], char)
    return token if tokens.token_to_chars(token)[0] >= char else token + 1


def check_embedded(tokenizer: Any, ids: Sequence[int]) -> None:
    """RowProblem for an id that the model has no embedding for: its tokenizer is larger than itself."""
    rows = getattr(tokenizer, "embedding_rows", None)  # set by tokenizers.load_tokenizer, from config.json
    if rows is None or len(tokenizer) <= rows:
        return
    worst = max(ids, default=0)
    if worst < rows:
        return
    token = tokenizer.convert_ids_to_tokens(worst)
    what = f"token {token!r} has the id {worst}, but the model embeds only the ids below {rows}"
    raise RowProblem("unknown_token", what, "use the tokenizer that belongs to the model, or resize its embedding")
