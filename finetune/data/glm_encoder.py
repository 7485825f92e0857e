"""ChatGLM's encoder: the interface of encoder.py over chat_glm.py, which builds ids segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.data import chat_glm, shown, thinking
from finetune.data.control_tokens import Guard
from finetune.data.offsets import check_embedded
from finetune.data.types import IGNORED, Conversation, Encoded, Message, RowProblem, attempted


class GlmEncoder:
    template: str | None = None
    origin = "ChatGLM3, encoded per segment"
    notice: str | None = None
    guard: Guard | None = None  # content is encoded without control tokens
    thinking = thinking.USUAL  # what stands between tags in content; the format knows of none
    plain: bool | None = None
    asks: bool | None = None

    def __init__(self, tokenizer: Any, treatment: str = "keep") -> None:
        self.tokenizer, self.treatment = tokenizer, treatment
        thinking.check_treatment(treatment, self.thinking, self.origin)
        self.separator: int | None = tokenizer.eos_token_id
        self.stop_ids: list[int] = chat_glm.stop_ids(tokenizer)
        self.end_id = chat_glm.end_id(tokenizer)
        self.losses = shown.Losses(self._shown)

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        messages, tools = conversation.messages, conversation.tools
        wanted = chat_glm.turn_weights(messages, train_on)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and wanted[i]]
        thinks = thinking.present(messages, answers, self.thinking)
        if self.treatment == "drop":
            messages = thinking.dropped(messages, self.thinking, answers)
        ids, weights = chat_glm.encode_weighted(self.tokenizer, messages, tools, train_on)
        check_embedded(self.tokenizer, ids)
        labels = [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]
        lost = self.losses.of(messages, tools)
        trained = {i for i, weight in enumerate(wanted) if weight}
        return Encoded(
            ids, labels, weights if set(weights) - {0, 1} else None, shown.told(lost, trained), thinks=thinks
        )

    def mode(self, conversation: Conversation, train_on: str = "assistant") -> tuple[bool, bool | None]:
        return False, None

    def _shown(self, messages: list[Message], tools: Any) -> str | None:
        ids = attempted(chat_glm.encode_weighted, self.tokenizer, messages, tools)
        return None if isinstance(ids, RowProblem) else str(self.tokenizer.decode(ids[0]))

    def plan_batch(self, conversations: Sequence[Conversation], train_on: str) -> list[Encoded | RowProblem]:
        return [attempted(self.encode, conversation, train_on) for conversation in conversations]

    def tokenize_batch(self, plans: list[Any]) -> None:
        return None

    def label_batch(self, plans: list[Encoded | RowProblem], tokens: None) -> list[Encoded | RowProblem]:
        return plans

    def forged_markers(self, messages: list[Message]) -> list[tuple[int, str]]:
        return []  # all its markers are control tokens, and content is encoded without them

    def identity(self) -> tuple[str, ...]:
        return (self.tokenizer.backend_tokenizer.to_str(), repr(chat_glm.glm_version(self.tokenizer)), self.treatment)

    def prompt_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, on: bool | None = None
    ) -> list[int]:
        if self.treatment == "drop":
            messages = thinking.dropped(messages, self.thinking)
        ids = list(chat_glm.prompt_ids(self.tokenizer, messages, tools))
        check_embedded(self.tokenizer, ids)
        return ids
