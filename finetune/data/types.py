"""What flows through data/: a Row as read becomes one or more Samples, and their conversations become Encoded.

A message is a dict: role (system|user|assistant|tool), content (str), and where they apply tool_calls (the OpenAI
form, arguments as an object), tool_call_id, name, metadata (ChatGLM3), reasoning_content, and train (False, True or
the turn's loss weight).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from finetune.errors import UserError

Message = dict[str, Any]


class RowProblem(UserError):
    """One row cannot be used. `kind` is a stable word for scripts, `fix` an imperative sentence.

    Where rows come from a file it is caught and told with file and row; in chat it is the user's error as it is.
    """

    def __init__(self, kind: str, message: str, fix: str | None = None, line: int | None = None) -> None:
        self.kind, self.message, self.fix, self.line = kind, message, fix, line
        self.ends_file = False  # what follows in the file could not be read: never to be left out silently
        self.raw: str | None = None  # the text that could not be parsed, for the file of rejects
        super().__init__(message, line=line, fix=fix)


def attempted(function: Any, *arguments: Any) -> Any:
    """The function's result, or the RowProblem it raises."""
    try:
        return function(*arguments)
    except RowProblem as problem:
        return problem


class Row(NamedTuple):
    data: dict[str, Any]
    file: str
    row: int  # from 1: the line of a jsonl file, the item of a json list
    problem: RowProblem | None = None  # the row could not be read; data is then empty


def is_plain(messages: Iterable[Message]) -> bool:
    """Whether every message is a role and a content, as nearly all are. Asked for every row at several steps, hence
    the loop: all() with a generator takes three times as long."""
    for message in messages:  # noqa: SIM110
        if len(message) != 2:
            return False
    return True


def folded(text: str) -> str:
    """Without case, spacing, width and closing punctuation."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    short = "".join(text.casefold().split())
    return short.rstrip(".!?。…") or short


class Sample:
    """What can be asked of every kind of sample."""

    __slots__ = ()

    @property
    def turns(self) -> list[Message]:
        """All messages, those of both answers of a pair included."""
        raise NotImplementedError

    @property
    def dialogue(self) -> list[Message]:
        """All messages but the answers that are compared or labelled."""
        return self.turns

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What the model may call."""
        return None

    @property
    def asked(self) -> list[Message]:
        """What a model is to answer."""
        return self.dialogue

    @property
    def reference(self) -> str | None:
        """The answer it should give, where there is one."""
        return None

    def conversations(self) -> dict[str, Conversation]:
        """What is encoded, by name; "" for the only one."""
        return {}

    def apart(self) -> Sequence[Sample]:
        """A pair as two labelled answers, anything else as it is."""
        return (self,)

    def fingerprint(self) -> int:
        """64 bits over everything that is trained on; equal for duplicates. Only for one run (Python's own hash)."""
        raise NotImplementedError

    @property
    def whole_text(self) -> str:
        return "\n".join([m["content"] for m in self.turns])

    @property
    def prompt_text(self) -> str:
        """The texts of all turns that are not the model's own."""
        return "\x1e".join([m["content"] for m in self.dialogue if m["role"] != "assistant"])

    @property
    def question(self) -> str:
        """The user's first turn, folded: equal for what is the same question, whatever the system turn says and however
        far the conversation goes on."""
        first = next((m["content"] for m in self.dialogue if m["role"] == "user"), None)
        return folded(self.prompt_text if first is None else first)

    @property
    def questions(self) -> str:
        """All turns of the user, likewise; "" where there are none."""
        return "\x1e".join([folded(m["content"]) for m in self.dialogue if m["role"] == "user"])

    @property
    def content_hash(self) -> int:
        """64 bits over the question, the same on every machine; equal questions fall on the same side of a split."""
        return xxhash.xxh3_64_intdigest(self.question.encode("utf-8", "surrogatepass"))


# Not frozen, which would double the time to make one; there is one per row.
@dataclass(slots=True)
class Conversation(Sample):
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    group: str | None = None
    """Of a held-out row: what its column `group` says. Metrics are given per group, too."""
    rival: list[Message] | None = None
    """The other answer of a pair: both are written with thinking where one of them thinks."""

    @property
    def turns(self) -> list[Message]:
        return self.messages

    @property
    def asked(self) -> list[Message]:
        return self.messages[:-1] if self._answered() else self.messages

    @property
    def reference(self) -> str | None:
        return str(self.messages[-1].get("content") or "") if self._answered() else None

    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def conversations(self) -> dict[str, Conversation]:
        return {"": self}

    def fingerprint(self) -> int:
        if not self.tools and is_plain(self.messages):
            return hash(tuple([m["content"] for m in self.messages]))
        return hash(repr((self.messages, self.tools)))


@dataclass(slots=True)
class Preference(Sample):
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def turns(self) -> list[Message]:
        return [*self.prompt, *self.chosen, *self.rejected]

    @property
    def dialogue(self) -> list[Message]:
        return self.prompt

    @property
    def reference(self) -> str | None:
        return str(self.chosen[-1].get("content") or "")

    def conversations(self) -> dict[str, Conversation]:
        prompt, chosen, rejected = untrained(self.prompt), self.chosen, self.rejected
        return {
            "chosen": Conversation(prompt + chosen, self.tools, rival=rejected),
            "rejected": Conversation(prompt + rejected, self.tools, rival=chosen),
        }

    def apart(self) -> list[Unpaired]:
        labelled = ((self.chosen, True), (self.rejected, False))
        return [Unpaired(self.prompt, answer, label, self.tools) for answer, label in labelled]

    def fingerprint(self) -> int:
        return hash(repr((self.prompt, self.chosen, self.rejected)))


@dataclass(slots=True)
class Unpaired(Sample):
    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None

    @property
    def turns(self) -> list[Message]:
        return [*self.prompt, *self.completion]

    @property
    def dialogue(self) -> list[Message]:
        return self.prompt

    @property
    def reference(self) -> str | None:
        return str(self.completion[-1].get("content") or "") if self.label else None

    def conversations(self) -> dict[str, Conversation]:
        return {"": Conversation(untrained(self.prompt) + self.completion, self.tools)}

    def fingerprint(self) -> int:
        return hash(repr((self.prompt, self.completion, self.label)))


@dataclass(slots=True)
class Text(Sample):
    text: str

    @property
    def turns(self) -> list[Message]:
        return [{"role": "text", "content": self.text}]

    def fingerprint(self) -> int:
        return hash(self.text)


def untrained(prompt: list[Message]) -> list[Message]:
    """Earlier answers of the assistant carry no loss where the last one is compared."""
    return [{**m, "train": False} if m["role"] == "assistant" else m for m in prompt]


IGNORED = -100


@dataclass(slots=True)
class Encoded:
    input_ids: list[int]
    labels: list[int]
    """The id itself where the token is trained, -100 elsewhere; as long as input_ids."""
    weights: list[float] | None = None
    """Loss weight per token, only when a turn asked for one other than 0 and 1."""
    lost: tuple[tuple[str, bool], ...] = ()
    """(what of the conversation the ids do not hold, whether it would have been trained)."""
    unprompted: tuple[int, ...] = ()
    """Trained turns, from 0, whose header is not what the model is prompted with."""
    thinks: bool = False
    """Whether a trained turn of the row has thinking."""
    passed: tuple[int, ...] = ()
    """Turns, from 1, that are not trained because the template writes them without the empty block of thinking."""

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return len(self.labels) - self.labels.count(IGNORED)

    @property
    def mask(self) -> list[int]:
        """1 where a token is trained."""
        return [int(label != IGNORED) for label in self.labels]
