"""Answers in OpenAI's shapes: whole, and as chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from finetune.serving.asking import Asked, Served
from finetune.serving.rows import Piece, Token


def token_text(tokenizer: Any, token: int) -> str:
    """A token as it stands in a text: sentencepiece shows the space before it as a letter of its own."""
    text = str(tokenizer.decode([token]))
    spaced = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {text}" if spaced and not text.startswith(" ") else text


class Chat:
    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, served: Served, asked: Asked) -> None:
        self.tokenizer, self.asked = served.writer.prompter.encoder.tokenizer, asked
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": served.name}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """pieces: the last of each row, with all of it."""
        choices = [self.choice(i, piece) for i, piece in enumerate(pieces)]
        counts = [piece.count for piece in pieces]
        return {"object": self.object, **self.head, "choices": choices, "usage": self.usage(counts)}

    def streamed(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        more = {} if usage is None else {"usage": usage}
        return {"object": self.chunk, **self.head, "choices": choices, **more}

    def usage(self, counts: Sequence[int]) -> dict[str, Any]:
        prompt, answers = self.asked.prompt_tokens, sum(counts)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "refusal": None, **self._message(piece)}
        if piece.calls:
            message["tool_calls"] = piece.calls
        logprobs = self._logprobs(index, piece.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": piece.finish}

    @staticmethod
    def _message(piece: Piece) -> dict[str, Any]:
        return {**piece.new, "content": piece.new.get("content", None if piece.calls else "")}

    def first(self, index: int) -> dict[str, Any] | None:
        """What stands before the first piece."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = dict(piece.new)
        if piece.calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(piece.calls)]
        logprobs = self._logprobs(index, piece.tokens)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.rows[index].top is None:
            return None
        content = [
            {**self._token(t.id, t.logprob), "top_logprobs": [self._token(i, value) for i, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        whole = "\ufffd" not in text  # part of a character has no text of its own
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode()) if whole else None}


class Completion(Chat):
    object, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, served: Served, asked: Asked) -> None:
        super().__init__(served, asked)
        self.offsets = [0] * len(asked.rows)

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs, text = self._logprobs(index, piece.tokens), piece.new.get("text", "")
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    part = choice

    def first(self, index: int) -> None:
        return None

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.rows[index].top is None:
            return None
        texts = [token_text(self.tokenizer, token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(text)
        top = [{token_text(self.tokenizer, i): finite(value) for i, value in token.top} for token in tokens]
        values = [finite(token.logprob) for token in tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def finite(logprob: float) -> float:
    """JSON has no word for the logarithm of 0; -9999 is OpenAI's."""
    return max(logprob, -9999.0)
