"""What flows through data/.

    Row               one record as read: its fields, and where it stands
    RowProblem        why one row cannot be used (an exception that converters raise; the reader adds file and row)
    Conversation      SFT: messages, and the tools the model may call
    Preference        one prompt, a better and a worse answer
    Unpaired          one prompt, one answer, good or bad
    Text              raw text
    Encoded           ids, labels and weights of one conversation

A message is a dict: role (system|user|assistant|tool), content (str), and where they apply tool_calls (the OpenAI
form, arguments as an object), tool_call_id, name, metadata (ChatGLM3), reasoning_content, and train (False, True or
the turn's loss weight).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    data: dict[str, Any]
    file: str
    row: int  # from 1: the line of a jsonl file, the item of a json list
    problem: RowProblem | None = None  # the row could not be read; data is then empty


@dataclass(slots=True)  # not frozen, which would double the time to make one; there is one per row
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    group: str | None = None
    """Of a held-out row: what its column `group` says. Metrics are given per group, too."""


@dataclass(frozen=True, slots=True)
class Preference:
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Unpaired:
    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    text: str


Sample = Conversation | Preference | Unpaired | Text

IGNORED = -100


@dataclass(slots=True)
class Encoded:
    input_ids: list[int]
    labels: list[int]
    """The id itself where the token is trained, -100 elsewhere; as long as input_ids."""
    weights: list[float] | None = None
    """Loss weight per token, only when a turn asked for one other than 0 and 1."""
    turns: list[tuple[int, int]] = field(default_factory=list)
    """Token ranges of the trained turns."""
    lost: tuple[tuple[str, bool], ...] = ()
    """(what of the conversation the ids do not hold, whether it would have been trained)."""


def attempted(function: Any, *arguments: Any) -> Any:
    """The function's result, or the RowProblem it raises."""
    try:
        return function(*arguments)
    except RowProblem as problem:
        return problem
