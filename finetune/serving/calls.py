"""Calls of tools read back from what a model writes.

How a chat format writes them is asked by experiment: a call of our own is encoded as it would be trained, and the
reader that finds it again in the text is the one.
"""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.data import thinking
from finetune.data.encoder import Encoder
from finetune.data.types import IGNORED, Conversation, Message, RowProblem
from finetune.json_text import decode

Call = dict[str, Any]
"""As in OpenAI's tool_calls: id, type, function: {name, arguments as JSON text}."""
Found = list[tuple[str, dict[str, Any]]]
"""(name, arguments) of each call."""

NAME, ARGUMENTS = "probe_call", {"probe_key": "v"}
PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": NAME, "description": "d", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}


@dataclass(frozen=True)
class CallFormat:
    opening: str
    """What stands before calls; "" where the whole answer is the call."""
    reader: Callable[[str], Found | None]
    special: frozenset[int] = frozenset()
    """Special tokens that are part of a call."""

    def read(self, text: str, names: Sequence[str]) -> list[Call] | None:
        """The calls in a text that begins with `opening`; None where it holds no such calls and is an answer."""
        found = self.reader(text) if text.strip() else None
        if not found or (not self.opening and not all(name in names for name, _ in found)):
            return None
        return [
            {
                "id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in found
        ]  # fmt: skip


def detected(encoder: Encoder) -> CallFormat | None:
    """How this chat format writes calls; None where it has none, or writes them in a way that is not read here."""
    messages: list[Message] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    try:
        encoded = encoder.encode(Conversation(messages, [TOOL]), "last")
    except RowProblem:
        return None
    ids = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != IGNORED]
    ids = ids[: next((n for n, i in enumerate(ids) if i in encoder.stop_ids), len(ids))]
    special = frozenset(ids) & frozenset(encoder.tokenizer.all_special_ids)
    text = thinking.decoded(encoder.tokenizer, ids, encoder.thinking, special)
    text = thinking.answer(text, encoder.thinking).text.strip()
    known = [json_format(text, special), CallFormat("", glm4_calls), CallFormat("", chatglm3_calls)]
    return next((one for one in known if one is not None and one.reader(text) == [(NAME, ARGUMENTS)]), None)


def json_format(text: str, special: frozenset[int]) -> CallFormat | None:
    """{"name": …, "arguments": …}, one or a list of them, between marks: Hermes, Qwen, Mistral, Llama 3."""
    places = [at for at in (text.find("{"), text.find("[{")) if at >= 0]
    if not places:
        return None
    opening = text[: min(places)].strip()
    end = max(text.rfind("}"), text.rfind("}]") + 1) + 1
    closing = text[end:].strip()
    return CallFormat(opening, lambda said: json_calls(said, opening, closing), special)


def json_calls(text: str, opening: str, closing: str) -> Found | None:
    """All of them. None where anything stands between them."""
    decoder, found = json.JSONDecoder(), []
    at = 0
    while at < len(text):
        mark = next((m for m in (opening, closing) if m and text.startswith(m, at)), None)
        if mark is not None or text[at].isspace() or text[at] in ",;":
            at += len(mark or " ")
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for call in value if isinstance(value, list) else [value]:
            arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
            if not isinstance(arguments, dict) or not isinstance(call.get("name"), str):
                return None
            found.append((call["name"], arguments))
    return found


def glm4_calls(text: str) -> Found | None:
    """The name, and on the next line the arguments as JSON."""
    name, _, rest = text.strip().partition("\n")
    try:
        arguments = decode(rest)
    except ValueError:
        return None
    return [(name.strip(), arguments)] if isinstance(arguments, dict) else None


def chatglm3_calls(text: str) -> Found | None:
    """The name, and below it Python: tool_call(key=value)."""
    name, _, rest = text.strip().partition("\n")
    code = rest.strip().removeprefix("```python").removesuffix("```").strip()
    try:
        parsed = ast.parse(code, mode="eval").body
        if not (isinstance(parsed, ast.Call) and isinstance(parsed.func, ast.Name) and parsed.func.id == "tool_call"):
            return None
        if parsed.args or any(word.arg is None for word in parsed.keywords):
            return None
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in parsed.keywords}
        json.dumps(arguments, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return [(name.strip(), arguments)]
