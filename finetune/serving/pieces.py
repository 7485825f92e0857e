"""From tokens to what a client gets: text without half characters, stop texts, thinking, tool calls.

Everything here takes text as it comes and hands on what is certain, so that a streamed answer and a whole one are the
same: tokens -> Decoder -> UntilStop -> Said (chat) or Continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from finetune.data.thinking import Thinking
from finetune.evaluation.streaming import Parts, overlap
from finetune.serving.calls import Call, CallFormat

HALF = "\ufffd"
"""What bytes decode to that are no whole character."""


class Decoder:
    """Tokens -> text; bytes wait for the rest of their character."""

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        """before: ids that the text goes on behind; where words begin, many tokenizers say by what stands before."""
        self.decode, self.ids = decode, list(before)
        self.start, self.read = 0, len(self.ids)  # decoded are the last piece and this one: the cost stays the same

    def add(self, token: int) -> str:
        self.ids.append(token)
        new = self._new()
        if new.endswith(HALF):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return new

    def rest(self) -> str:
        """What still waits, without the beginning of a character."""
        return self._new().rstrip(HALF)

    def _new(self) -> str:
        known = self.decode(self.ids[self.start : self.read])
        return self.decode(self.ids[self.start :])[len(known) :]


class UntilStop:
    """Text up to the first of some texts; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.waiting, self.found = stops, "", False

    def add(self, text: str, last: bool = False) -> str:
        text = self.waiting + text
        places = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            self.waiting, self.found = "", True
            return text[: min(places)]
        kept = 0 if last else max((overlap(text, stop) for stop in self.stops), default=0)
        self.waiting = text[len(text) - kept :]
        return text[: len(text) - kept]


class Stripped:
    """Text without white space at both ends."""

    def __init__(self) -> None:
        self.waiting, self.begun = "", False

    def add(self, text: str) -> str:
        text = self.waiting + text
        certain = (text if self.begun else text.lstrip()).rstrip()
        self.begun = self.begun or bool(certain)
        self.waiting = text[len(text.rstrip()) :] if self.begun else ""
        return certain


class Sayer(Protocol):
    """Makes of text what stands in an answer: key -> what is new of it."""

    def add(self, text: str, last: bool = False) -> dict[str, str]: ...
    def calls(self) -> list[Call]: ...


class Continued:
    """The very characters that follow a text."""

    def add(self, text: str, last: bool = False) -> dict[str, str]:
        return {"text": text} if text else {}

    def calls(self) -> list[Call]:
        return []


class Said:
    """An answer in a chat: reasoning_content and content, and at its end the calls of tools."""

    def __init__(
        self, marks: Thinking, begun: bool, calls: CallFormat | None = None, names: Sequence[str] = ()
    ) -> None:
        """begun: the prompt ends inside the thinking. calls: how the model writes calls of `names`."""
        self.marks, self.format, self.names = marks, calls, names
        self.parts = Parts(marks, self._hear, begun)
        self.ends = {"reasoning_content": Stripped(), "content": Stripped()}
        self.new: dict[str, str] = {}
        self.held = ""
        self.called: list[Call] = []

    def add(self, text: str, last: bool = False) -> dict[str, str]:
        self.new = {}
        self.parts.add(text, last)
        if last and self.format is not None:
            found = self.format.read(self.held, self.names)
            if found is None:
                self._say("content", self.held)
            self.called, self.held = found or [], ""
        return {key: text for key, text in self.new.items() if text}

    def calls(self) -> list[Call]:
        return self.called

    def _hear(self, text: str, thinks: bool) -> None:
        if thinks:
            self._say("reasoning_content", "" if text == self.marks.begin else text.removesuffix(self.marks.end))
        elif self.format is None:
            self._say("content", text)
        else:
            self.held += text
            at = self.held.find(self.format.opening)  # 0 for formats without one: the whole answer waits
            certain = len(self.held) - overlap(self.held, self.format.opening) if at < 0 else at
            self._say("content", self.held[:certain])
            self.held = self.held[certain:]

    def _say(self, key: str, text: str) -> None:
        self.new[key] = self.new.get(key, "") + self.ends[key].add(text)
