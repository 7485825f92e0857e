"""A chat template as a table of what stands between the contents of its turns, and that table in Go's template syntax.

Ollama renders conversations with Go templates, which are no Jinja. What a template writes is learned by rendering it,
and every shape of conversation is then compared: what the table cannot say is named. That the Go text does what
`Turns.render` does was checked with Go itself: tools/ollama_template, tests/fixtures/ollama.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Render = Callable[..., str | None]
"""Of (messages, prompt: bool, tools): what the chat template writes; None where it refuses the conversation."""
START, END = "", "end"
ROLES = ("system", "user", "assistant")
MARKS = {"system": "Qsystemq{}z", "user": "Quserq{}z", "assistant": "Qassistantq{}z"}
WAYS = (
    ("user", "assistant", "user"), ("system", "user", "assistant", "user"), ("system", "user"),
    ("user", "assistant", "system"), ("user", "system"), ("system",), ("assistant", "user"), ("user", "assistant"),
)  # fmt: skip
"""Conversations from which is learned what stands between turns; what an earlier one has told counts. An answer that is
not the last comes first: of the last one templates also write how it came about."""


@dataclass(frozen=True)
class Turns:
    between: dict[tuple[str, str], str]
    """(role before, role behind) -> what stands between their contents; START and END are roles, too."""
    system: str | None = None
    """What a template says to the model where a conversation does not."""
    missing: list[str] = field(default_factory=list)
    """Shapes of conversations that come out otherwise, in words."""

    def render(self, messages: list[Message]) -> str:
        """What Ollama makes of a conversation: turns of one role in a row become one, and what ends with an answer is
        an answer to go on with."""
        out, before = "", START
        for message in joined(messages):
            role = message["role"]
            if role in ROLES:
                out += self.between.get((before, role), "") + message["content"]
                before = role
        return out + self.between.get((before, END), "")

    def go(self) -> str:
        """The same in Go's syntax."""
        cases = ""
        for number, role in enumerate(ROLES):
            found = {before: text for (before, behind), text in self.between.items() if behind == role and text}
            opening = chosen(found)
            cases += f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{opening}{{{{ .Content }}}}'
            cases += f'{{{{ $before = "{role}" }}}}'
        ending = chosen({before: text for (before, behind), text in self.between.items() if behind == END and text})
        return f'{{{{ $before := "" }}}}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{ending}'


def chosen(found: dict[str, str]) -> str:
    """Go's text for what depends on the role before."""
    if not found:
        return ""
    branches = ""
    for number, (before, text) in enumerate(found.items()):
        branches += f'{{{{ {"else if" if number else "if"} eq $before "{before}" }}}}{literal(text)}'
    return branches + "{{ end }}"


def literal(text: str) -> str:
    """A text, quoted within an action where it would be read as one or end the quotes of the Modelfile."""
    if "{{" in text or "}}" in text or '"""' in text:
        return "{{ print " + json.dumps(text, ensure_ascii=False).replace('""', '"+"') + " }}"
    return text


def joined(messages: list[Message]) -> list[Message]:
    """As Ollama hands a conversation to a template."""
    out: list[Message] = []
    for message in messages:
        if out and out[-1]["role"] == message["role"] != "tool":
            out[-1] = {**out[-1], "content": f"{out[-1]['content']}\n\n{message['content']}"}
        else:
            out.append(dict(message))
    return out


def conversation(*roles: str) -> list[Message]:
    counts: dict[str, itertools.count[int]] = {role: itertools.count() for role in ROLES}
    return [{"role": role, "content": MARKS[role].format(next(counts[role]))} for role in roles]


def learned(render: Render) -> Turns | None:
    """The table of a chat template. None where it does not write the plainest conversations as one."""
    between: dict[tuple[str, str], str] = {}
    for way in WAYS:
        begun = way[-1] == "assistant"
        found = parts(render, way, prompt=not begun) or []
        behind = way if begun else (*way, END)
        for before, role, text in zip((START, *way), behind, found, strict=False):
            between.setdefault((before, role), text)
    if not {(START, "user"), ("user", "assistant"), ("assistant", "user"), ("user", END)} <= between.keys():
        return None
    turns = Turns(between, system_of(between))
    wrong = [name for name, messages in PLAIN.items() if differs(turns, render, messages)]
    if wrong:
        return None
    return Turns(between, turns.system, [name for name, given in SHAPES.items() if differs(turns, render, **given)])


def parts(render: Render, roles: tuple[str, ...], prompt: bool) -> list[str] | None:
    """What is written before, between and behind the contents, in which the latest turn's must stand as it is."""
    messages = conversation(*roles)
    text = render(messages, prompt)
    if text is None:
        return None
    out = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            return None
        out.append(before)
    return [*out, text]


def system_of(between: dict[tuple[str, str], str]) -> str | None:
    """The words of a template that speaks where no system turn does."""
    plain, opening, closing = (between.get(pair) for pair in ((START, "user"), (START, "system"), ("system", "user")))
    if plain is None or not opening or not closing or len(plain) <= len(opening) + len(closing):
        return None
    if plain.startswith(opening) and plain.endswith(closing):
        return plain[len(opening) : len(plain) - len(closing)].strip() or None
    return None


def differs(turns: Turns, render: Render, messages: list[Message], **more: Any) -> bool:
    """Whether a conversation that the template takes comes out otherwise."""
    begun = messages[-1]["role"] == "assistant"
    wanted = render(messages, not begun, **more)
    if wanted is None:
        return False
    got = turns.render(messages)
    if not begun:
        return got != wanted
    content = messages[-1]["content"]
    return not (wanted.startswith(got) and got.endswith(content))


def said(*turns: tuple[str, str], **more: Any) -> list[Message]:
    return [{"role": role, "content": content, **more} for role, content in turns]


LONG = 'two lines,\n\n  indented; {{ .Content }} {% if %} <b>"q"</b> 北京 🙂'
TALK = said(("user", "Hi"), ("assistant", "Hello."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "So?"))
PLAIN: dict[str, list[Message]] = {
    "a question": said(("user", "Hi")),
    "a conversation": TALK,
    "odd texts": said(("user", LONG), ("assistant", LONG), ("user", "b")),
    "a system turn": said(("system", "Be brief."), ("user", "Hi")),
    "a system turn and a conversation": [*said(("system", LONG)), *TALK],
}
"""Conversations that have to come out the same, or there is no template at all."""
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALLS = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
SHAPES: dict[str, dict[str, Any]] = {
    "an answer to go on with": {"messages": said(("user", "Hi"), ("assistant", "Hel"))},
    "white space around a turn": {"messages": said(("user", "  Hi \n"), ("assistant", "\nHello. "), ("user", " b"))},
    "a system turn in the middle": {
        "messages": said(("user", "Hi"), ("assistant", "Hello."), ("system", "Be brief."), ("user", "b"))
    },
    "two turns of the user in a row": {"messages": said(("user", "Hi"), ("user", "Still there?"))},
    "tools": {"messages": said(("user", "Hi")), "tools": [TOOL]},
    "calls of tools and their results": {
        "messages": [
            *said(("user", "Hi")), {"role": "assistant", "content": "", "tool_calls": CALLS},
            {"role": "tool", "name": "f", "content": "3"},
        ]
    },
    "thinking in the last answers": {
        "messages": [*said(("user", "Hi")), *said(("assistant", "Hello."), reasoning_content="Greet."),
                     *said(("user", "b"))]
    },
    "thinking written into earlier answers": {
        "messages": said(("user", "Hi"), ("assistant", "<think>\nGreet.\n</think>\n\nHello."), ("user", "b"))
    },
}  # fmt: skip
"""Others that templates write: those that come out otherwise are named in the Modelfile."""
