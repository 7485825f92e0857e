"""An answer that is being written, and the batch that it is written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.evaluation.sampling import Drawn, Repeated, uniforms
from finetune.recipe.sections import GenerationConfig as Settings
from finetune.serving.calls import Call
from finetune.serving.grammar import Grammar
from finetune.serving.pieces import Decoder, Sayer, UntilStop


@dataclass(frozen=True)
class Token:
    id: int
    logprob: float
    """Of the model itself, before temperature, penalties and cuts."""
    top: list[tuple[int, float]]
    """The likeliest at this place, and theirs."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    new: dict[str, str]
    tokens: list[Token]
    finish: str | None = None
    """stop, length or tool_calls, in the last one."""
    calls: list[Call] = field(default_factory=list)
    count: int = 0
    """Tokens of the whole answer, the one that ends it included; in the last one."""


Event = Piece | Exception


@dataclass
class Row:
    prompt: list[int]
    room: int
    """Tokens that may be written."""
    how: Settings
    name: object
    """Names the random numbers, with how.seed."""
    decoder: Decoder
    stops: UntilStop
    sayer: Sayer
    put: Callable[[Event], None]
    live: bool = False
    """Whether each piece is wanted when it comes."""
    top: int | None = None
    """Wanted logprobs: so many of the likeliest beside that of each token."""
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None

    gone: bool = False
    """Nobody waits for it any more; set by whoever asked."""
    done: bool = False
    ids: list[int] = field(default_factory=list)
    raw: torch.Tensor | None = None
    """[vocabulary] log-probabilities of the step, where they are wanted."""
    new: dict[str, str] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    """What has not been put yet."""

    def take(self, token: int, ends: frozenset[int]) -> None:
        """One more token."""
        if self.gone:
            self.done = True
            return
        self.ids.append(token)
        if token in ends:
            self.close("stop")
            return
        if self.raw is not None and self.top is not None:
            values, places = self.raw.topk(self.top)
            likeliest = list(zip(places.tolist(), values.tolist(), strict=True))
            self.tokens.append(Token(token, float(self.raw[token]), likeliest))
        self.say(self.sayer.add(self.stops.add(self.decoder.add(token))))
        if self.stops.found or (self.grammar is not None and self.grammar.take(token)):
            self.close("stop")
        elif len(self.ids) >= self.room:
            self.close("length")
        elif self.live and self.new:
            self.put(Piece(self.new, self.tokens))
            self.new, self.tokens = {}, []

    def say(self, new: dict[str, str]) -> None:
        for key, text in new.items():
            self.new[key] = self.new.get(key, "") + text

    def close(self, finish: str) -> None:
        rest = "" if self.stops.found else self.stops.add(self.decoder.rest(), last=True)
        finish = "stop" if self.stops.found else finish
        self.say(self.sayer.add(rest, last=True))
        calls = self.sayer.calls()
        self.done = True
        finish = "tool_calls" if calls and finish == "stop" else finish
        self.put(Piece(self.new, self.tokens, finish, calls, len(self.ids)))


class Batch:
    """Rows that are written together, each by its own settings: what `generate` asks at every step."""

    def __init__(self, rows: Sequence[Row], ends: Sequence[int], mask: torch.Tensor) -> None:
        """mask: [rows, prompt], 0 on the padding at the left."""
        self.rows, self.ends, self.device = rows, frozenset(ends), mask.device
        self.repeated = {
            i: Repeated(row.how.repetition_penalty, mask[i : i + 1])
            for i, row in enumerate(rows)
            if row.how.repetition_penalty != 1
        }
        alike: dict[tuple[Any, ...], list[int]] = {}
        for i, row in enumerate(rows):
            if row.how.drawn:
                alike.setdefault((row.how.temperature, row.how.top_k, row.how.top_p), []).append(i)
        steps = max(row.room for row in rows) + 1
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.drawn = []
        for numbers in alike.values():
            draws = torch.zeros(len(numbers), steps, dtype=torch.float64)
            for at, i in enumerate(numbers):
                draws[at, : rows[i].room] = uniforms(rows[i].how.seed, [rows[i].name], rows[i].room)[0]
            where = torch.tensor(numbers, device=self.device)
            self.drawn.append((where, Drawn(rows[numbers[0]].how, draws.to(self.device, exact))))

    def scores(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits processor."""
        for i, row in enumerate(self.rows):
            if row.done:
                continue
            if row.top is not None:
                row.raw = scores[i].log_softmax(-1)
            for token, bias in row.bias.items():
                scores[i, token] += bias
            if (row.presence or row.frequency) and row.ids:
                written, counts = torch.tensor(row.ids, device=self.device).unique(return_counts=True)
                scores[i, written] -= counts * row.frequency + row.presence
            if i in self.repeated:
                scores[i : i + 1] = self.repeated[i](ids[i : i + 1], scores[i : i + 1])
            if row.grammar is not None:
                row.grammar.forbid(scores[i])
        for where, drawn in self.drawn:
            scores[where] = drawn(ids[where], scores[where])
        return scores

    def taken(self, ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        """The stopping criterion: which rows are done."""
        for row, token in zip(self.rows, ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.take(token, self.ends)
        return torch.tensor([row.done for row in self.rows], device=self.device)
