"""JSON that a model cannot fail to write: tokens that would break it are forbidden, by llguidance."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import torch

MODULE = "llguidance"


class NoGrammar(Exception):
    """Why there is none, in a line."""


def installed() -> bool:
    return importlib.util.find_spec(MODULE) is not None


def vocabulary(tokenizer: Any, size: int, ends: list[int]) -> Any:
    """The tokenizer as llguidance knows it; takes about a second. NoGrammar for one that is not fast."""
    from llguidance import hf

    try:
        return hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=ends or None)
    except (ValueError, TypeError, AttributeError) as error:
        raise NoGrammar(f"not for this model's tokenizer ({next(iter(str(error).splitlines()), '')})") from None


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, known: Any, schema: dict[str, Any]) -> None:
        """known: of `vocabulary`. NoGrammar for a schema that is none."""
        from llguidance import LLMatcher

        try:
            self.matcher = LLMatcher(known, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
        except ValueError as error:
            raise NoGrammar(next(iter(str(error).splitlines()), "")) from None
        if self.matcher.is_error():
            raise NoGrammar(next(iter(self.matcher.get_error().splitlines()), ""))

    def forbid(self, scores: torch.Tensor) -> None:
        """[vocabulary], changed in place."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        allowed = np.pad(allowed, (0, len(scores) - len(allowed)))
        if allowed.any():
            scores[~torch.from_numpy(allowed).to(scores.device)] = -torch.inf

    def take(self, token: int) -> bool:
        """One more token; whether nothing may follow it."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())
