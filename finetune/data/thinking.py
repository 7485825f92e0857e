"""Thinking: the switch that a chat template has for it, how it is marked, which rows hold some, what stands behind it.

Asked by experiment, because templates are programs. `on` is always whether a text is written as one with thinking:
True, False, or None for what the template does when it is not told.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from finetune.data.templates import U, attempt, turn
from finetune.data.types import Message, RowProblem
from finetune.errors import UserError
from finetune.places import read_json

SWITCHES = ("enable_thinking", "thinking")
"""What templates call it: Qwen3, GLM-4.5, Nemotron, Gemma 4, SmolLM3; DeepSeek-V3.1, Granite, Kimi."""
MARKS = (
    ("<think>", "</think>"), ("<|channel>thought", "<channel|>"), ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)  # fmt: skip
"""Where a template shows no thinking by itself: the first pair whose end it knows, otherwise the first."""


@dataclass(frozen=True)
class Thinking:
    """What a chat template knows of thinking."""

    switch: str | None = None
    """The variable that turns it on and off."""
    default: bool | None = None
    """What is done where the switch is not given; None without a switch."""
    begin: str = MARKS[0][0]
    end: str = MARKS[0][1]
    shown: bool = False
    """Whether the last turn's reasoning_content is written."""
    reads_tags: bool = True
    """Whether <think>…</think> inside the content is written like reasoning_content, and an empty one like none."""

    @property
    def known(self) -> bool:
        return self.shown or self.switch is not None

    def variables(self, on: bool | None) -> dict[str, bool]:
        return {} if on is None or self.switch is None else {self.switch: on}


@functools.lru_cache(maxsize=32)
def detected(template: str, variables: tuple[tuple[str, str], ...]) -> Thinking:
    known: dict[str, Any] = dict(variables)
    usual = attempt(template, [U], None, known, prompt=True)
    switch = default = None
    for name in SWITCHES:
        on, off = (attempt(template, [U], None, {**known, name: value}, prompt=True) for value in (True, False))
        if on != off and on is not None and off is not None:
            switch, default = name, True if usual == on else False if usual == off else None
            known[name] = True
            break
    begin, end = next((pair for pair in MARKS if pair[1] in template), MARKS[0])
    text = attempt(template, [U, turn("assistant", "qanswerz", reasoning_content="qthoughtz")], None, known) or ""
    before, _, after = text.partition("qthoughtz")
    between, shown, _ = after.partition("qanswerz")
    if shown and before.split() and between.strip():
        begin, end = before.split()[-1], between.strip()
        begin = MARKS[0][0] if begin.endswith(MARKS[0][0]) else MARKS[1][0] if end == MARKS[1][1] else begin
    if not shown:
        return Thinking(switch, default, begin, end)
    return Thinking(switch, default, begin, end, True, reads_tags(template, text, known, switch))


def reads_tags(template: str, text: str, known: dict[str, Any], switch: str | None) -> bool:
    """text: with "qthoughtz" as reasoning_content before "qanswerz"."""
    begin, end = MARKS[0]
    off = {**known, **({switch: False} if switch else {})}
    thinks, empty = (turn("assistant", f"{begin}\n{words}\n{end}\n\nqanswerz") for words in ("qthoughtz", ""))
    tagged, none = (attempt(template, [U, given], None, off) or "" for given in (empty, turn("assistant", "qanswerz")))
    found = attempt(template, [U, thinks], None, known) or ""
    return found.split() == text.split() and tagged.split() == none.split()


USUAL = Thinking()


class Answer(NamedTuple):
    text: str
    """Behind the thinking; "" where that does not end."""
    thought: str
    unfinished: bool


def answer(text: str, marks: Thinking = USUAL, begun: bool = False) -> Answer:
    """What is said and what was thought before it, by the template's own marks or by the usual ones.

    begun: the prompt ends inside the thinking. Behind the last closing mark, as templates read it.
    """
    for begin, end in dict.fromkeys(((marks.begin, marks.end), MARKS[0])):
        opened = begun or text.lstrip().startswith(begin)
        thought, found, rest = text.rpartition(end)
        if found and (opened or begin not in thought):
            return Answer(rest.strip(), thought.strip().removeprefix(begin).strip(), False)
        if opened and (not begun or marks.end not in text):
            return Answer("", text.strip().removeprefix(begin).strip(), True)
    return Answer(text, "", False)


def begun(tokenizer: Any, prompt: list[int], marks: Thinking) -> bool:
    """Whether a prompt ends inside the thinking, as those of Qwen3.5 and DeepSeek-R1 do."""
    return str(tokenizer.decode(prompt[-16:])).rstrip().endswith(marks.begin)


def decoded(tokenizer: Any, ids: list[int], marks: Thinking, also: Collection[int] = ()) -> str:
    """Text without special tokens, but with those that mark thinking. also: ids of others that stay."""
    special = {i: str(t) for i, t in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)}
    kept = {i for i, token in special.items() if token in marks.begin or token in marks.end or i in also}
    if kept.isdisjoint(ids):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    parts = [tokenizer.decode(list(run), skip_special_tokens=not mark) for mark, run in groupby(ids, kept.__contains__)]
    return "".join(parts)


# --- rows ---


def thought(message: Message, marks: Thinking) -> str:
    """What a turn of the assistant thinks before it speaks; "" for nothing, and for an empty block."""
    given = str(message.get("reasoning_content") or "").strip()
    return given if given or not is_marked(message, marks) else answer(message["content"], marks).thought


def is_marked(message: Message, marks: Thinking) -> bool:
    """Whether a mark of thinking stands in the content: no for nearly all."""
    content = message["content"]
    return marks.end in content or marks.begin in content or MARKS[0][0] in content or MARKS[0][1] in content


def present(messages: list[Message], turns: Iterable[int], marks: Thinking) -> bool:
    """Whether one of these turns thinks."""
    return any(thought(messages[i], marks) for i in turns)


def unfinished(messages: list[Message], marks: Thinking) -> list[int]:
    """The turns, from 1, that begin to think and never end."""
    said = [(i, m) for i, m in enumerate(messages, 1) if m["role"] == "assistant" and is_marked(m, marks)]
    return [i for i, message in said if answer(message["content"], marks).unfinished]


def moves(message: Message, marks: Thinking) -> Answer | None:
    """What a turn says and thinks where the template does not look for tags in its content, and some stand there: it
    would write an empty block before them (Qwen3.8), take them for a part of the answer (Gemma 4, gpt-oss), or write an
    empty block of the row's otherwise than none (Nemotron 3)."""
    if marks.reads_tags or message["role"] != "assistant" or not is_marked(message, marks):
        return None
    said = answer(message["content"], marks)
    twice = said.thought and message.get("reasoning_content")
    return None if said.unfinished or twice or said.text == message["content"] else said


def moved(messages: list[Message], marks: Thinking) -> list[Message]:
    """The turns with their thinking in `reasoning_content`; the same list where there is nothing to move."""
    found = {i: said for i, message in enumerate(messages) if (said := moves(message, marks)) is not None}
    if not found:
        return messages
    out = list(messages)
    for i, said in found.items():
        out[i] = {**messages[i], "content": said.text}
        if said.thought:
            out[i]["reasoning_content"] = said.thought
    return out


def dropped(messages: list[Message], marks: Thinking, needed: Collection[int] = ()) -> list[Message]:
    """The turns without thinking. RowProblem for one of `needed` in which nothing else is said."""
    out = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and ("reasoning_content" in message or is_marked(message, marks)):
            said = answer(message["content"], marks).text
            message = {**{k: v for k, v in message.items() if k != "reasoning_content"}, "content": said}
            if i in needed and not said.strip() and not message.get("tool_calls"):
                what = f"turn {i + 1}: nothing is left without its thinking (data.thinking: drop)"
                raise RowProblem("empty_answer", what, "remove the row, or set data.thinking: keep")
        out.append(message)
    return out


# --- what is asked for ---


def check_treatment(treatment: str, marks: Thinking, origin: str) -> None:
    """UserError for an empty block where the chat format has none."""
    if treatment == "empty" and marks.switch is None:
        what = f"empty needs a chat template that can be told not to think, and {origin} cannot"
        raise UserError(what, key="data.thinking", fix="leave it out, or set drop to take thinking out of rows")


E = TypeVar("E")


def asked(encoder: E, on: bool | None, key: str) -> E:
    """The encoder whose prompts ask for thinking or for none. UserError, for `key`, where there is no switch."""
    made: Any = copy.copy(encoder)
    if on is not None and made.thinking.switch is None:
        what = f"the chat template has no switch for thinking ({made.origin})"
        raise UserError(what, key=key, fix=f"leave it out ({' and '.join(SWITCHES)} are looked for)")
    made.asks = on
    return cast(E, made)


def named(on: bool | None) -> str:
    return "as the template does" if on is None else "on" if on else "off"


def switched(word: str | None) -> bool | None:
    return None if word is None else word == "on"


# --- what a run was trained with ---

FILE = "thinking.json"


def record(encoder: Any, counts: dict[str, int]) -> dict[str, Any]:
    """For result.json and beside the weights: `shown` is how the rows were written, on, off or both.

    Rows without thinking that are written as the template does by itself stand for both: their reply, block included,
    follows the prompt for on, and begins with all of the prompt for off.
    """
    thinking = 0 if encoder.treatment == "drop" else counts.get("thinking", 0)
    others = counts["used"] - thinking
    shown = {"on"} if thinking else set()
    if others:
        shown |= {"on", "off"} if encoder.plain is None else {named(encoder.plain)}
    return {"data.thinking": encoder.treatment, "rows_with": thinking, "rows_without": others, "shown": sorted(shown)}


def read(folder: Path) -> dict[str, Any]:
    """The record of what was trained; {} where there is none, or it is not ours."""
    told = read_json(folder / FILE)
    shown = told.get("shown")
    sound = told.get("data.thinking") in ("keep", "drop", "empty") and isinstance(shown, list)
    return told if sound and set(map(str, shown or ())) <= {"on", "off"} else {}


def of_prompts(recipe: Any, encoder: Any) -> bool | None:
    """How the prompts of ft ppo ask, as far as the recipe says it."""
    on = switched(recipe.ppo.thinking)
    return False if on is None and recipe.data.thinking != "keep" and encoder.thinking.switch is not None else on


def usual(told: dict[str, Any]) -> bool | None:
    """How what was trained so is asked where nothing is said."""
    shown = told.get("shown", [])
    return shown == ["on"] if len(shown) == 1 else None


def mismatch(told: dict[str, Any], on: bool | None, marks: Thinking) -> str | None:
    """A warning where thinking was trained otherwise than it is asked for."""
    does = marks.default if on is None else on
    if does is None or usual(told) in (None, does) or marks.switch is None:
        return None
    how = f"data.thinking: {told['data.thinking']}"
    return f"thinking is {named(does)}, and training only showed it {named(not does)} ({how})"
