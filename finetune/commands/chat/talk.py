"""A conversation, and who answers in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data import thinking
from finetune.data.types import Conversation, Message
from finetune.errors import UserError
from finetune.evaluation.answering import Writer
from finetune.evaluation.options import overridden
from finetune.evaluation.streaming import Show, Stop, stream
from finetune.recipe.sections import GenerationConfig
from finetune.run.writing import as_line, escaped

BASE = "base"
"""What the model without adapters is called."""


@dataclass(frozen=True)
class Exchange:
    question: Message
    answers: list[Message]
    """Of each side."""
    whole: list[bool]
    """Whether the model ended it."""
    stopped: bool = False


@dataclass
class Talk:
    writers: dict[str, Writer]
    """By name; all on one base in memory."""
    name: str
    """Of the one that answers."""
    base: Writer | None = None
    versus: bool = False
    """The base answers, too, and remembers what it said itself."""
    system: str | None = None
    how: GenerationConfig = field(default_factory=GenerationConfig)
    max_new_tokens: int = 512
    exchanges: list[Exchange] = field(default_factory=list)
    drawn: int = 0
    """Answers so far, those that were undone included: asked again, another one is drawn."""

    @property
    def sides(self) -> list[Writer]:
        tuned = self.named(self.name)
        return [self.base, tuned] if self.versus and self.base is not None else [tuned]

    def named(self, name: str) -> Writer:
        found = self.base if name == BASE and BASE not in self.writers else self.writers.get(name)
        if found is None:
            raise UserError(f"no adapter {name!r} is loaded", key="/adapter", fix=f"one of {', '.join(self.names)}")
        return found

    @property
    def names(self) -> list[str]:
        """Those that can be switched to."""
        adapters = [name for name, writer in self.writers.items() if writer.target.adapter is not None]
        return [*adapters, *([BASE] if adapters and self.base is not None and not self.versus else [])]

    def who(self) -> str:
        others = [name for name in self.names if name != self.name]
        answers = " and ".join(writer.target.name for writer in self.sides)
        return f"{answers} answer{'' if self.versus else 's'}" + (f"; /adapter {' | '.join(others)}" if others else "")

    # --- what is said ---

    def messages(self, side: int) -> list[Message]:
        """The conversation as one side remembers it."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*start, *(turn for one in self.exchanges for turn in (one.question, one.answers[side]))]

    def ask(self, text: str, shows: Sequence[Show], stop: Stop | None = None) -> Exchange:
        """Nothing is remembered of a question that cannot be asked, or of an answer that failed."""
        question = {"role": "user", "content": text}
        answers, whole, stopped = [], [], False
        for side, (writer, show) in enumerate(zip(self.sides, shows, strict=True)):
            if stop is not None:
                stop.requested = False
            asked = [*self.messages(side), question]
            made = stream(writer, asked, self.how, self.max_new_tokens, show, self.drawn, stop)
            answers.append(made.turn)
            whole.append(made.whole)
            stopped = stopped or (stop is not None and stop.requested and not made.whole)
        self.drawn += 1
        self.exchanges.append(exchange := Exchange(question, answers, whole, stopped))
        return exchange

    def switch(self, name: str) -> None:
        """Another adapter answers from now on, in the same conversation."""
        if name not in self.names:
            have = f"one of {', '.join(self.names)}" if self.names else "start with --adapter NAME=PATH"
            raise UserError(f"no adapter {name!r} is loaded", key="/adapter", fix=have)
        self.name = name

    def say_as_system(self, text: str | None) -> None:
        before, self.system = self.system, text
        try:
            self.check_system()
        except UserError:
            self.system = before
            raise

    def check_system(self) -> None:
        """UserError where the chat format has no place for a system turn."""
        for writer in self.sides if self.system is not None else ():
            start: list[Message] = [{"role": "system", "content": self.system}, {"role": "user", "content": "?"}]
            writer.prompter.ids(Conversation(start))

    # --- how it is said ---

    def settings(self) -> dict[str, Any]:
        encoder = self.sides[-1].prompter.encoder
        thinks = {} if encoder.thinking.switch is None else {"thinking": thinking.named(encoder.asks)}
        return {**self.how.chosen, "max_new_tokens": self.max_new_tokens, **thinks}

    def set_generation(self, given: dict[str, Any]) -> None:
        self.how = overridden(self.how, given)
        if "seed" in given:
            self.drawn = 0

    def set_thinking(self, on: bool) -> None:
        writers = [*self.writers.values(), *([] if self.base is None else [self.base])]
        asked = [thinking.asked(writer.prompter.encoder, on, "/params thinking") for writer in writers]
        for writer, encoder in zip(writers, asked, strict=True):
            writer.prompter = replace(writer.prompter, encoder=encoder)

    # --- what is kept ---

    def save(self, path: Path) -> int:
        """One row of `messages`, in a new file; how many of its answers are marked as not to be trained on."""
        if not self.exchanges:
            raise UserError("nothing was said yet", key="/save", fix="ask something first")
        side = len(self.sides) - 1
        messages = self.messages(side)
        cut = 0
        for place, one in zip(range(len(messages) - 1, 0, -2), reversed(self.exchanges), strict=False):
            if not (one.whole[side] and one.answers[side]["content"].strip()):
                messages[place] = {**messages[place], "train": False}
                cut += 1
        write_new(path, escaped(as_line({"messages": messages}).rstrip()) + "\n")
        return cut


def write_new(path: Path, text: str) -> None:
    """UserError where something is already, however it got there, and where nothing can be written."""
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise UserError("is there already, and nothing is overwritten", path=path, fix="name a new file") from None
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot be written: {what}", path=path, key="/save", fix="name another file") from None
