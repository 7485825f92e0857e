"""One turn, however it was written, becomes one message dict (see types.py for its keys).

Everything here raises RowProblem with a message that names the turn, counted from 1.
"""

from __future__ import annotations

import itertools
import json
import math
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from finetune.data.types import Message, RowProblem, is_plain
from finetune.json_text import decode

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
    "function_call": "function_call", "tool_call": "function_call",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
}  # fmt: skip
PLAIN = {name: role for name, role in ROLES.items() if role != "function_call"}
FLAGS = ("train", "loss", "weight", "loss_weight", "training")
KEPT = ("name", "tool_call_id", "metadata")
REASONING = ("reasoning_content", "thinking", "reasoning")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
READ = {
    "role", "from", "content", "value", "text", "tool_calls", "function_call", "tools", *KEPT, *FLAGS, *REASONING,
}  # fmt: skip
"""The keys of a turn that mean something; `checks.unread` names the others."""

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("reasoning", "thinking")
CALL_PARTS = ("tool_call", "tool_calls", "function_call", "tool_use")
MEDIA_PARTS = (
    "image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file",
)  # fmt: skip


def text_of(value: Any, where: str) -> str:
    """A content field as one string: strings as they are, content parts joined, None as empty."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            if isinstance(part, str):
                raise RowProblem("wrong_type", f"{where} is a list of texts", "make it one string")
            if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS:
                parts.append(text_of_part(part, where))
            else:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                what = f"{where}: a content part of type {kind!r}"
                raise RowProblem("unsupported_content", what, "keep text parts only")
        return "".join(parts)
    if isinstance(value, dict) and value.get("type") in TEXT_PARTS:
        return text_of_part(value, where)
    raise RowProblem("wrong_type", f"{where} is {kind_of(value)}, not text", "make it a string")


def text_of_part(part: dict[str, Any], where: str) -> str:
    """The text of one content part, whoever's: {type, text}, {type, value}, {type, content}, {type, text: {value}}."""
    kind = part.get("type", "text")
    found = [key for key in dict.fromkeys(("text", "value", "content", kind)) if part.get(key) is not None]
    if not found and not any(key in part for key in ("text", "value", "content")):
        have = ", ".join(sorted(map(str, part)))
        what = f"{where}: a content part of type {kind!r} holds no text (its keys: {have})"
        raise RowProblem("unsupported_content", what, "write {type: text, text: …}")
    texts = [text_of(v.get("value") if isinstance(v, dict) else v, where) for v in (part[key] for key in found)]
    if len(set(texts)) > 1:
        what = f"{where}: a content part with different texts under {' and '.join(found)}"
        raise RowProblem("unsupported_content", what, "keep one of them")
    return texts[0] if texts else ""


def spread(turn: dict[str, Any], parts: list[dict[str, Any]], role: str, where: str) -> dict[str, Any]:
    """The turn with its content parts under the keys where other formats have them: its text as content, reasoning,
    tool calls, tools."""
    texts: list[Any] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    tools: list[Any] = []
    for part in parts:
        kind = part.get("type", "text")
        if kind in REASONING_PARTS and role == "assistant":
            thoughts.append(text_of_part(part, where))
        elif kind in CALL_PARTS and role == "assistant":
            arguments = part.get("arguments", part.get("input"))
            named = {"name": part.get("name"), "arguments": arguments, "id": part.get("id")}
            calls += parse_calls(part.get("value", part.get(kind, named)), where)
        elif kind == "tools":
            tools += parse_tools(part.get("value", part.get("tools"))) or []
        else:
            texts.append(part)
    out = {key: value for key, value in turn.items() if key not in ("content", "value", "text")}
    for key, found in (("reasoning_content", "\n".join(thoughts)), ("tool_calls", calls), ("tools", tools)):
        if found and out.get(key):
            what = f"{where}: {key} both as a content part and as a key of the turn"
            raise RowProblem("unsupported_content", what, "keep one of them")
        if found:
            out[key] = found
    return {**out, "content": text_of(texts, where)}


def kind_of(value: Any) -> str:
    """JSON's word for a value's type; a table may hold others."""
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "a boolean", int: "a number", float: "a number", Decimal: "a number", list: "a list", dict: "an object",
        str: "text", bytes: "bytes", datetime: "a date", date: "a date",
    }  # fmt: skip
    return names.get(type(value), f"a value of type {type(value).__name__}")


def answer_text(value: Any, where: str) -> str:
    """Fields of flat formats: text, or a number as people write answers ("answer": 42)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text_of(value, where)
    return str(value)


def to_messages(turns: Any, column: str) -> list[Message]:
    """A list of turns in any of the known spellings -> messages.

    Turns are {from, value}, {role, content} or {role, text}; function_call turns become assistant messages with
    tool_calls; ChatGLM3's {role: tool, name, parameters, observation} becomes a call and its result.
    """
    if isinstance(turns, str) and turns.lstrip()[:1] == "[":
        turns = parse_json(turns, column, "wrong_type")
    if not isinstance(turns, list):
        what = f"{column} is {kind_of(turns)}, not a list of turns"
        raise RowProblem("wrong_type", what, "make it a list of {role, content}")
    # LIMA's form: question and answer in turn
    if turns and type(turns[0]) is str and all(type(turn) is str for turn in turns):
        turns = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if type(turn) is dict and len(turn) == 2:  # the common case, three times faster than the whole way
            role = PLAIN.get(turn["role"] if "role" in turn else turn.get("from"))  # type: ignore[arg-type]
            content = turn["content"] if "content" in turn else turn.get("value")
            if role is not None and type(content) is str:
                messages.append({"role": role, "content": content})
                continue
        if not isinstance(turn, dict):
            what = f"{column}, turn {number} is {kind_of(turn)}, not an object"
            raise RowProblem("wrong_type", what, "write {role, content}")
        convert_turn(turn, f"{column}, turn {number}", messages)
    return messages if is_plain(messages) else in_order_of_calls(messages)


def in_order_of_calls(messages: list[Message]) -> list[Message]:
    """Results of parallel calls in the order of the calls they name: most templates show no ids."""
    out: list[Message] = []
    for is_tool, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        turns = list(group)
        calls = [call.get("id") for call in out[-1].get("tool_calls", [])] if is_tool and out else []
        if all(turn.get("tool_call_id") in calls for turn in turns) and None not in calls:
            turns.sort(key=lambda turn: calls.index(turn["tool_call_id"]))
        out += turns
    return out


def convert_turn(turn: dict[str, Any], where: str, messages: list[Message]) -> None:
    """Append the message (ChatGLM3 tool turns: two messages) that `turn` stands for."""
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str):
        raise RowProblem("missing_role", f"{where} has no role", "add role (or from): system, user, assistant or tool")
    role = ROLES.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        raise RowProblem("unknown_role", f"{where}: unknown role {name!r}", "use system, user, assistant or tool")
    if role == "tool" and "observation" in turn and "parameters" in turn:
        chatglm3_tool_turn(turn, where, messages)
        return
    raw = turn["content"] if "content" in turn else turn.get("value", turn.get("text", MISSING))
    if raw is MISSING and not (turn.get("tool_calls") or turn.get("function_call")):
        raise RowProblem("missing_content", f"{where} has no content", "add content (or value)")
    if is_parts(raw) and (role != "tool" or all(p["type"] in (*TEXT_PARTS, *MEDIA_PARTS) for p in raw)):
        turn = spread(turn, raw, role, where)
        raw = turn["content"]
    called = turn.get("tool_calls") or turn.get("function_call")
    if role == "function_call":
        calls = parse_calls(called if raw is MISSING else raw, where)
        message: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    else:
        if role == "tool" and isinstance(raw, dict | list):
            raw = json.dumps(raw, ensure_ascii=False)
        message = {"role": role, "content": text_of(None if raw is MISSING else raw, where)}
        if role == "assistant" and called:
            message["tool_calls"] = parse_calls(called, where)
    if len(turn) > 2:
        extras(turn, message, where)
    if role == "function_call" and messages and joins(messages[-1], message):
        # Calls in a row are parallel calls, and what was said just before them belongs to the same turn.
        before = messages.pop()
        calls = [*before.get("tool_calls", []), *message["tool_calls"]]
        message = {**before, **message, "content": before["content"], "tool_calls": calls}
    messages.append(message)


def joins(before: Message, call: Message) -> bool:
    """Whether a call is part of the turn before it."""
    one_thought = "reasoning_content" not in call or "reasoning_content" not in before
    return before["role"] == "assistant" and before.get("train") == call.get("train") and one_thought


MISSING = object()


def is_parts(raw: Any) -> bool:
    return isinstance(raw, list) and bool(raw) and all(isinstance(part, dict) and "type" in part for part in raw)


def extras(turn: dict[str, Any], message: Message, where: str) -> None:
    """Copy the optional keys; loss flags become `train`."""
    for key in KEPT:
        value = turn.get(key)
        if value is not None and value != "":
            message[key] = text_of(value, f"{where}, {key}")
    for key in REASONING:
        if turn.get(key) is not None and (text := text_of(turn[key], f"{where}, {key}")).strip():
            if message.get("reasoning_content", text) != text:
                what = f"{where}: two different texts of thinking, one of them under {key!r}"
                raise RowProblem("two_thoughts", what, "keep one of them")
            message["reasoning_content"] = text
    for key in FLAGS:
        if turn.get(key) is not None:
            message["train"] = loss_flag(turn[key], f"{where}, {key}")
    if turn.get("tools"):
        message["tools"] = parse_tools(turn["tools"])  # ChatGLM3 writes them into the system turn


def loss_flag(value: Any, where: str) -> bool | float:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and 0 <= value < math.inf:
        return bool(value) if value in (0, 1) else float(value)
    raise RowProblem("bad_loss_flag", f"{where} is {value!r}", "use true, false or a weight of at least 0")


def chatglm3_tool_turn(turn: dict[str, Any], where: str, messages: list[Message]) -> None:
    """{role: tool, name, parameters, observation}: the call joins the assistant's thought before it."""
    arguments = turn["parameters"] if isinstance(turn["parameters"], dict) else {}
    call = make_call(str(turn.get("name", "")), arguments, where)
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        messages[-1] = {**messages[-1], "tool_calls": [call]}
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    seen = turn["observation"]
    content = seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False)
    messages.append({"role": "tool", "content": content})


def make_call(name: Any, arguments: Any, where: str, call_id: Any = None) -> dict[str, Any]:
    if not isinstance(name, str) or not name:
        raise RowProblem("bad_tool_call", f"{where}: the tool call has no name", "write {name, arguments}")
    if isinstance(arguments, str):
        arguments = parse_json(arguments or "{}", f"{where}, arguments of {name}", "bad_tool_call")
    if not isinstance(arguments, dict):
        what = f"{where}: the arguments of {name} are {kind_of(arguments)}, not an object"
        raise RowProblem("bad_tool_call", what, "make them an object")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **call} if isinstance(call_id, str) else call


def parse_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """A tool call in any form (object, list, JSON text; bare or with `function`) -> OpenAI tool_calls."""
    if isinstance(value, str):
        value = parse_json(value, f"{where}, tool call", "bad_tool_call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict):
            what = f"{where}: the tool call is {kind_of(call)}, not an object"
            raise RowProblem("bad_tool_call", what, "write {name, arguments}")
        inner = call.get("function")
        function: dict[str, Any] = inner if isinstance(inner, dict) else call
        arguments = function.get("arguments", function.get("parameters", {}))
        calls.append(make_call(function.get("name"), arguments, where, call.get("id")))
    return calls


def parse_tools(value: Any) -> list[dict[str, Any]] | None:
    """The `tools` column (list, object or JSON text; bare functions or OpenAI's wrapping) -> OpenAI tools, or None."""
    if isinstance(value, str):
        if not value.strip():
            return None
        value = parse_json(value, "tools", "bad_tools")
    if not value:
        return None
    tools: list[dict[str, Any]] = []
    for tool in value if isinstance(value, list) else [value]:
        if not isinstance(tool, dict):
            what = f"tools: {kind_of(tool)} where a function description belongs"
            raise RowProblem("bad_tools", what, "list {name, parameters}")
        tools.append(tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool})
        if not isinstance(tools[-1]["function"].get("name"), str):
            raise RowProblem("bad_tools", "tools: a function without a name", "give each function a name")
    return tools


def parse_json(text: str, what: str, kind: str) -> Any:
    try:
        return decode(text)
    except ValueError as error:
        raise RowProblem(kind, f"{what}: not JSON ({error})", "write valid JSON") from None
