"""What makes ids of conversations, and what is done with the result, whoever made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from finetune.data.control_tokens import Guard
from finetune.data.shown import Losses
from finetune.data.thinking import Thinking
from finetune.data.types import IGNORED, Conversation, Encoded, Message, RowProblem


class Encoder(Protocol):
    """chat.TemplateEncoder (any chat template) or glm_encoder.GlmEncoder (ChatGLM's formats)."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def template(self) -> str | None: ...  # the chat template, where ids are built with one
    @property
    def origin(self) -> str: ...  # of the chat format, in words
    @property
    def notice(self) -> str | None: ...  # what a user should be told of it
    @property
    def stop_ids(self) -> list[int]: ...  # tokens that end a reply
    @property
    def end_id(self) -> int | None: ...  # the token that closes a reply in training
    @property
    def separator(self) -> int | None: ...  # an end token that replies share with documents
    @property
    def guard(self) -> Guard | None: ...  # finds written-out control tokens; None where none can be written
    @property
    def losses(self) -> Losses: ...  # what of a conversation never reaches the ids
    @property
    def thinking(self) -> Thinking: ...  # the template's switch for it, and its marks
    @property
    def treatment(self) -> str: ...  # data.thinking
    @property
    def plain(self) -> bool | None: ...  # `on` for rows without thinking; None: as the template does by itself
    @property
    def asks(self) -> bool | None: ...  # whether prompts ask for thinking; see thinking.asked

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        """Ids and labels of one conversation. RowProblem when it cannot be encoded."""

    # Many at once in three steps, so that the second, which runs outside of Python's lock, can run beside the others.
    def plan_batch(self, conversations: Sequence[Conversation], train_on: str) -> list[Any]: ...
    def tokenize_batch(self, plans: list[Any]) -> Any: ...
    def label_batch(self, plans: list[Any], tokens: Any) -> list[Encoded | RowProblem]: ...

    def mode(self, conversation: Conversation, train_on: str = "assistant") -> tuple[bool, bool | None]:
        """(whether a trained turn has thinking; `on`: how the conversation is written)."""

    def prompt_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, on: bool | None = None
    ) -> list[int]:
        """Ids of the conversation so far and the header of the assistant's turn, for generation. `on`: with thinking or
        without; by default what the encoder `asks` for."""

    def forged_markers(self, messages: list[Message]) -> list[tuple[int, str]]:
        """(turn from 1, marker) for every turn marker in content that only looks like text to the tokenizer."""

    def identity(self) -> tuple[str, ...]:
        """Everything the ids depend on, for the cache."""


LONGEST = 4  # bytes of a character, each of which may be a token


def whole(tokenizer: Any, ids: list[int], end: int) -> int:
    """`end`, or the place before it where no character is cut in half."""
    for place in range(end, max(end - LONGEST, 0), -1):
        if not tokenizer.decode(ids[max(place - 2 * LONGEST, 0) : place]).endswith("\ufffd"):
            return place
    return end


def cut(tokenizer: Any, row: Encoded, limit: int | None) -> Encoded:
    """The first `limit` tokens of a row, less those of a character that would be cut in half."""
    if limit is None or len(row.input_ids) <= limit:
        return row
    end = whole(tokenizer, row.input_ids, limit)
    return Encoded(row.input_ids[:end], row.labels[:end], row.weights and row.weights[:end])


def scored_ids(encoded: Encoded, separator: int | None) -> list[int]:
    """How much of a conversation that ends with a reply a reward model reads; the score stands at the last token.

    That is the end of turn, and nothing that a template writes behind it: there a sampled reply ends. Only ChatGLM's
    `</s>` is left out, which in pre-training separates documents, so that what is computed there need not know the
    document. That of tiny-chatglm3 does not: read at `</s>`, a reward model learned nothing in 240 steps (loss 0.65);
    read one token earlier, it came to 0.20 in 125.
    """
    ids = encoded.input_ids[: max(i for i, label in enumerate(encoded.labels) if label != IGNORED) + 1]
    return ids[:-1] if ids[-1] == separator else ids


def scored_end(encoder: Encoder) -> int | None:
    """The token with which a finished reply is scored: the one that closes it in training, but for a separator."""
    return None if encoder.end_id == encoder.separator else encoder.end_id
