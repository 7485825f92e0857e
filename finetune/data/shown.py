"""What of a conversation never reaches the ids.

Asked by experiment, because templates are programs: a word of its own is written into every field, and those that the
text does not hold are lost. The answer depends on the shape of a conversation only, and is kept by it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

from finetune.data.types import Message, is_plain

TAG = re.compile(r"</?[A-Za-z][\w:-]*>|\[/?[A-Z_]{3,}\]")
SAID = ("content", "thinking", "tool call")
"""Fields that are a turn's own words: where the turn is trained, none may be lost."""
ALL_TOOLS = -1
"""The turn of fields that belong to the conversation's tools."""


def tags_of(template: str) -> re.Pattern[str] | None:
    """What a template may look for inside content (<think>): these stay where they are in the experiment."""
    found = sorted(set(TAG.findall(template)))
    return re.compile(f"({'|'.join(map(re.escape, found))})") if found else None


KEPT = 10_000  # shapes whose answer is remembered


class Losses:
    def __init__(self, show: Callable[[list[Message], Any], str | None], tags: re.Pattern[str] | None = None) -> None:
        """show: (messages, tools) -> text, None where refused."""
        self.show, self.tags = show, tags
        self.known: dict[Any, list[tuple[int, str]]] = {}

    def of(self, messages: list[Message], tools: Any) -> list[tuple[int, str]]:
        """(turn from 0, field) of what `show` leaves out, in order, each once."""
        key = shape(messages, tools, self.tags)
        if key not in self.known:
            if len(self.known) >= KEPT:
                self.known.clear()
            written, described, words = experiment(messages, tools, self.tags)
            text = self.show(written, described)  # None: refused for what the words are; the row itself was not
            places = [] if text is None else [place for word, place in words.items() if word not in text]
            self.known[key] = list(dict.fromkeys(places))
        return self.known[key]


def shape(messages: list[Message], tools: Any, tags: re.Pattern[str] | None) -> Any:
    """Equal for conversations of which the same fields are lost."""
    plain = not tools and is_plain(messages)
    if plain and (tags is None or not any("<" in m["content"] or "[" in m["content"] for m in messages)):
        return tuple([(m["role"], not m["content"].strip()) for m in messages])
    return repr(experiment(messages, tools, tags)[:2])


def experiment(
    messages: list[Message], tools: Any, tags: re.Pattern[str] | None
) -> tuple[list[Message], Any, dict[str, tuple[int, str]]]:
    """(messages and tools with words instead of texts, word -> its place)."""
    words: dict[str, tuple[int, str]] = {}
    names: dict[str, str] = {}  # of functions: what a tool's result repeats
    count = itertools.count()

    def word(turn: int, field: str) -> str:
        new = f"q{next(count)}z"
        words[new] = (turn, field)
        return new

    def argument(value: Any, turn: int) -> Any:
        if isinstance(value, dict):
            return {word(turn, "tool call"): argument(v, turn) for k, v in value.items()}
        if isinstance(value, list):
            return [argument(v, turn) for v in value]
        return word(turn, "tool call") if isinstance(value, str) and value.strip() else value

    def called(call: dict[str, Any], turn: int) -> dict[str, Any]:
        function = call["function"]
        names[function["name"]] = name = word(turn, "tool call")
        arguments = argument(function.get("arguments"), turn)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def spoken(text: str, turn: int, role: str) -> str:
        if tags is None or role in ("user", "tool"):  # there, tags are text
            return word(turn, "content") if text.strip() else text
        parts, thinking = [], False
        for part in tags.split(text):
            if tags.fullmatch(part):
                thinking = part.lower().startswith("<think")
            elif part.strip():
                new = word(turn, "thinking" if thinking and role == "assistant" else "content")
                part = part.replace(part.strip(), new, 1)
            parts.append(part)
        return "".join(parts)

    written = []
    for turn, message in enumerate(messages):
        new = {**message, "content": spoken(message["content"], turn, message["role"])}
        new.pop("train", None)
        if message.get("reasoning_content"):
            new["reasoning_content"] = word(turn, "thinking")
        if message.get("tool_calls"):
            new["tool_calls"] = [called(call, turn) for call in message["tool_calls"]]
        if message.get("name"):
            is_tool = message["role"] == "tool"  # whose name the call before it says
            new["name"] = names.get(message["name"], message["name"]) if is_tool else word(turn, "name")
        if message.get("metadata"):
            new["metadata"] = word(turn, "metadata")
        if message.get("tools"):
            new["tools"] = [{"name": word(turn, "tools")}]
        written.append(new)
    return written, [described(tool, word) for tool in tools] if tools else tools, words


def described(tool: dict[str, Any], word: Callable[[int, str], str]) -> dict[str, Any]:
    """A tool with words for its name, its description and its parameters' names."""
    function = dict(tool["function"])
    function["name"] = word(ALL_TOOLS, "the name of a tool")
    if str(function.get("description") or "").strip():
        function["description"] = word(ALL_TOOLS, "the description of a tool")
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
        names = {key: word(ALL_TOOLS, "a parameter of a tool") for key in parameters["properties"]}
        properties = {names[key]: value for key, value in parameters["properties"].items()}
        function["parameters"] = {**parameters, "properties": properties}
        if isinstance(parameters.get("required"), list):
            function["parameters"]["required"] = [names.get(str(key), key) for key in parameters["required"]]
    return {**tool, "function": function}


def told(found: list[tuple[int, str]], trained: set[int]) -> tuple[tuple[str, bool], ...]:
    """(what is lost, whether it would have been trained), as Encoded has it."""
    names = [field if turn == ALL_TOOLS else f"the {field} of turn {turn + 1}" for turn, field in found]
    return tuple([(name, field in SAID and turn in trained) for name, (turn, field) in zip(names, found, strict=True)])
