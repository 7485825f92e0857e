"""One answer while it is written: its text as it comes, what is thought told apart from what is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from finetune.adapters.multiple import activated
from finetune.data import thinking
from finetune.data.encoder import Encoder
from finetune.data.thinking import Thinking
from finetune.data.types import Conversation, Message
from finetune.errors import FinetuneError, RunError
from finetune.evaluation.answering import Writer
from finetune.evaluation.generation import Settings, answer, decode, stop_ids
from finetune.evaluation.sampling import uniforms
from finetune.models.hardware import input_device

Show = Callable[[str, bool], None]
"""What is done with a piece of text; True for thinking."""


@dataclass
class Stop:
    """A stopping criterion that somebody else can raise, a signal's handler for instance."""

    requested: bool = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)


@dataclass(frozen=True)
class Streamed:
    turn: Message
    whole: bool
    """The model ended it: neither the room that there was did, nor somebody."""


def stream(
    writer: Writer, messages: list[Message], how: Settings, max_new_tokens: int, show: Show, number: int = 0,
    stop: Stop | None = None,
) -> Streamed:  # fmt: skip
    """The answer to a conversation, shown while it is written. A drawn one depends on how.seed and `number` alone.

    UserError where the conversation cannot be asked, RunError when the model fails.

    Args:
        stop: ends the answer, as Ctrl-C then does; without one Ctrl-C is the caller's.
    """
    assert writer.network is not None
    encoder, longest = writer.prompter.encoder, writer.prompter.longest
    prompt = writer.prompter.ids(Conversation(messages))
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(prompt))
    begun = thinking.begun(encoder.tokenizer, prompt, encoder.thinking)
    with activated(writer.network) as model, torch.inference_mode():
        stops, pad = stop_ids(model, encoder), encoder.tokenizer.pad_token_id
        streamer = Streamer(encoder, stops, Parts(encoder.thinking, show, begun))
        ids = torch.tensor([prompt], device=input_device(model))
        draws = uniforms(how.seed, [number], room) if how.drawn else None
        more: dict[str, Any] = {"streamer": streamer} | ({} if stop is None else {"stopping_criteria": [stop]})
        try:
            answer(model, ids, torch.ones_like(ids), room, stops, pad, how, draws, **more)
        except KeyboardInterrupt:
            if stop is None:
                raise
        except (FinetuneError, OSError):  # the latter of whoever reads
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            advice = "a shorter conversation (/reset, /undo) or a smaller --max-new-tokens may help"
            raise RunError(f"the model could not go on: {type(error).__name__}: {reason}; {advice}") from error
    streamer.end()
    whole = bool(streamer.ids) and streamer.ids[-1] in stops
    return Streamed(turn_of(decode(encoder, streamer.ids, stops), encoder, begun), whole)


def turn_of(text: str, encoder: Encoder, begun: bool) -> Message:
    """An answer as the turn that it was: the template knows what becomes of its thinking later on."""
    found = thinking.answer(text, encoder.thinking, begun)
    if not encoder.thinking.known or not (found.thought or found.unfinished):
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": found.text, "reasoning_content": found.thought}


class Streamer(BaseStreamer):
    """Decodes all ids each time, for `generate`: piece by piece, as transformers' own streamers do it, sentencepiece
    loses the space before a piece. White space waits for what follows it, bytes for the rest of their character."""

    def __init__(self, encoder: Encoder, stops: list[int], parts: Parts) -> None:
        self.encoder, self.stops, self.parts = encoder, set(stops), parts
        self.ids: list[int] = []
        self.shown, self.prompted = "", False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompted:  # generate begins with the prompt
            self.prompted = True
            return
        self.ids += value.reshape(-1).tolist()
        self.show(self.text().rstrip("\ufffd").rstrip())

    def end(self) -> None:
        self.show(self.text().rstrip(), last=True)

    def text(self) -> str:
        ids = [i for i in self.ids if i not in self.stops]
        return thinking.decoded(self.encoder.tokenizer, ids, self.encoder.thinking)

    def show(self, text: str, last: bool = False) -> None:
        new, self.shown = text[len(self.shown) :], max(text, self.shown, key=len)
        self.parts.add(new, last)


class Parts:
    """Hands on text with whether it is thinking, a mark never cut in two; white space at the beginning is left out."""

    def __init__(self, marks: Thinking, show: Show, thinks: bool) -> None:
        self.marks, self.show, self.thinks = marks, show, thinks
        self.waiting, self.said = "", False

    def add(self, text: str, last: bool = False) -> None:
        self.waiting += text
        while self.waiting:
            if not (self.thinks or self.said):
                self.waiting = self.waiting.lstrip()
            mark = self.marks.end if self.thinks else "" if self.said else self.marks.begin
            at = self.waiting.find(mark) if mark else -1
            if at >= 0 and self.thinks:
                self.hand_on(at + len(mark))
                self.thinks = False
            elif at == 0:  # behind other words it is only spoken of
                self.thinks = True
                self.hand_on(len(mark))
            else:
                self.hand_on(len(self.waiting) - (0 if last else overlap(self.waiting, mark)))
                return

    def hand_on(self, count: int) -> None:
        text, self.waiting = self.waiting[:count], self.waiting[count:]
        self.said = self.said or (bool(text) and not self.thinks)
        if text:
            self.show(text, self.thinks)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
