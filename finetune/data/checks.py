"""What can be wrong with one sample, without a tokenizer: a list of Finding per sample.

`error` findings make the row unusable for training; `warning` findings are reported and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from finetune.data.control_tokens import all_strings
from finetune.data.messages import MEDIA, READ, REASONING
from finetune.data.types import Conversation, Message, Preference, Sample, Text, Unpaired, is_plain


class Finding(NamedTuple):
    level: str  # error | warning
    kind: str
    message: str
    fix: str | None = None


error, warning = partial(Finding, "error"), partial(Finding, "warning")


def check(sample: Sample, text: str) -> list[Finding]:
    """All findings of one sample; `text` is its `whole_text`."""
    if isinstance(sample, Conversation):
        found = turn_order(sample.messages)
        if sample.tools or not is_plain(sample.messages):
            half = HALF.search(all_strings([sample.messages, sample.tools or []]))
            if half is not None and half[0] not in text:
                what = f"half a surrogate pair (\\u{ord(half[0]):04x}) in a tool call or description"
                found.append(error("broken_encoding", what, "mend the \\u escapes"))
    else:
        found = list(STRUCTURE[type(sample)](sample))
    if (not text.isascii() and SUSPECT.search(text)) or "\x00" in text:
        found += [f for number, m in enumerate(sample.turns, 1) for f in encoding(m["content"], f"turn {number}")]
    return found


def preference(sample: Preference) -> Iterator[Finding]:
    yield from prompt(sample.prompt)
    yield from answer(sample.chosen, "chosen")
    yield from answer(sample.rejected, "rejected")
    if sample.chosen == sample.rejected:
        yield error("same_answers", "chosen and rejected are the same", "remove the row")


def unpaired(sample: Unpaired) -> Iterator[Finding]:
    yield from prompt(sample.prompt)
    yield from answer(sample.completion, "the completion")


def raw(sample: Text) -> Iterator[Finding]:
    if not sample.text.strip():
        yield error("empty_text", "the text is empty", "remove the row")


STRUCTURE: dict[type[Sample], Callable[[Any], Iterable[Finding]]] = {
    Preference: preference,
    Unpaired: unpaired,
    Text: raw,
}


def prompt(messages: list[Message]) -> list[Finding]:
    if not messages:
        return [error("empty_conversation", "there is no prompt", "add one, or remove the row")]
    return turn_order(messages, answered=False)


def answer(messages: list[Message], name: str) -> Iterable[Finding]:
    if not messages or messages[0]["role"] != "assistant":
        yield error("wrong_order", f"{name} does not begin with the assistant's turn", "mend the row")
    elif all(blank(m) for m in messages):
        yield error("empty_answer", f"{name} is empty", "fill it in, or remove the row")


def blank(message: Message) -> bool:
    return not message["content"].strip() and not message.get("tool_calls") and not message.get("reasoning_content")


FOLLOWS = {
    # role: what may stand before it ("" is the beginning)
    "system": {""},
    "user": {"", "system", "assistant", "tool"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def turn_order(messages: list[Message], answered: bool = True) -> list[Finding]:
    """Roles in order, no blank turns, with `answered` at least one answer of the assistant."""
    if not messages:
        return [error("empty_conversation", "the conversation has no turns", "remove the row")]
    found: list[Finding] = []
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in FOLLOWS[role]:
            what, fix = order_message(number, role, before), order_fix(message, before, messages[number - 2])
            found.append(error("wrong_order", what, fix))
            if role == "system":
                continue  # one complaint is enough: judge the next turn by the one before
        if not message["content"].strip() and blank(message):
            found += blank_turn(number, message)
        if role == "tool" and before == "assistant" and not messages[number - 2].get("tool_calls"):
            found.append(warning("stray_tool_result", f"turn {number}: a tool result, but no call before it"))
        before = role
    if answered and before != "assistant":
        if any(message["role"] == "assistant" for message in messages):
            found.append(warning("unanswered", f"ends with a turn of the {before}, which is not trained"))
        else:
            found.append(error("no_answer", "no turn of the assistant, nothing to learn", "add the answer"))
    return found


def order_message(number: int, role: str, before: str) -> str:
    if role == "system":
        return f"turn {number}: a system turn that is not the first"
    if not before or before == "system":
        return f"turn {number}: the conversation begins with the {role}"
    return f"turn {number}: {role} after {before}"


def order_fix(message: Message, before: str, previous: Message) -> str:
    role = message["role"]
    if role == "system":
        return "move it to the beginning, or into the user's turn"
    if role == before == "assistant":
        if message.get("tool_calls") or previous.get("tool_calls"):
            return "write them as one turn: parallel calls are one turn with several tool_calls"
        return "join the two into one turn, or add the user's turn between them"
    if role == before:
        return "join the two into one turn, or add the answer between them"
    if role == "tool":
        return "put the assistant's turn with the call before it"
    return "add the user's turn before it, or remove it"


def unread(row: Mapping[str, Any], text: str) -> Iterator[Finding]:
    """What a row says and nobody reads: keys of turns that mean nothing here, columns with thinking or images.

    `text` is all that was read; the message of a warning ends with the key.
    """
    for column, turns in row.items():
        if turns and column in UNREAD and not (isinstance(turns, str) and turns.strip() in text):
            yield warning("unread_key", f"a column that is not read: {column}")
        if not isinstance(turns, list):
            continue
        for number, turn in enumerate(turns, 1):
            if not isinstance(turn, dict) or len(turn) == 2 or not ("role" in turn or "from" in turn):
                continue
            for key in turn.keys() - READ:
                if turn[key] in (None, "", [], {}) or ("observation" in turn and key in ("observation", "parameters")):
                    continue
                where = f"{column}, turn {number}"
                if key in MEDIA:
                    fix = "remove the row; models are trained on text only"
                    yield error("unsupported_content", f"{where}: {key} cannot be read", fix)
                else:
                    yield warning("unread_key", f"{where}: not read: {key}")


UNREAD = {*REASONING, *MEDIA}


def trained_in_vain(messages: list[Message]) -> Iterator[Finding]:
    """Turns that ask to be trained and are not the assistant's."""
    for number, message in () if is_plain(messages) else enumerate(messages, 1):
        if message["role"] != "assistant" and message.get("train"):
            what = f"turn {number}: not read: train (only turns of the assistant are trained)"
            yield warning("unread_key", what)


def blank_turn(number: int, message: Message) -> Iterable[Finding]:
    role = message["role"]
    if role == "assistant" and message.get("train", True):
        yield error("empty_answer", f"turn {number}: the assistant's answer is empty", "fill it in, or remove the row")
    elif role == "user":
        yield error("empty_turn", f"turn {number}: the user's turn is empty", "fill it in, or remove the row")
    elif role != "tool":  # a tool may well return nothing
        yield warning("empty_turn", f"turn {number}: the {role}'s turn is empty")


HALF = re.compile("[\ud800-\udfff]")
SUSPECT = re.compile("[\x00\ufffd\ud800-\udfff]|锟斤拷|烫烫烫|Ã[\x80-\xbf]|â€")


def encoding(text: str, where: str) -> Iterable[Finding]:
    """Half characters, replacement characters and text that was decoded wrongly once."""
    hit = SUSPECT.search(text)
    if hit is None:
        return
    char = hit[0]
    if "\ud800" <= char <= "\udfff":
        yield error("broken_encoding", f"{where}: half a surrogate pair (\\u{ord(char):04x})", "mend the \\u escapes")
    elif char == "\x00":
        yield warning("broken_encoding", f"{where}: a NUL character")
    elif char == "\ufffd":
        yield warning("broken_encoding", f"{where}: U+FFFD, a character that was lost in a conversion")
    else:
        yield warning("broken_encoding", f"{where}: {char!r} looks like text decoded with the wrong encoding")
