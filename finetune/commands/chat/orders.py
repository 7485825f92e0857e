"""The commands of a conversation: /help and the rest."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.commands.chat.screen import Screen
from finetune.commands.chat.talk import Talk
from finetune.commands.chat.typed import BLOCK
from finetune.errors import UserError
from finetune.recipe.sections import GenerationConfig
from finetune.terminal.progress import note, shown_path

LEAVING = ("exit", "quit")


def reset(talk: Talk, screen: Screen, text: str) -> None:
    talk.exchanges.clear()
    note("the conversation begins anew" + ("" if talk.system is None else ", under the same system turn"))


def undo(talk: Talk, screen: Screen, text: str) -> None:
    if not talk.exchanges:
        raise UserError("nothing was said yet", key="/undo")
    note(f"forgotten: {' '.join(talk.exchanges.pop().question['content'].split())[:60]}")


def system(talk: Talk, screen: Screen, text: str) -> None:
    if text:
        talk.say_as_system(None if text == '""' else text)
    elif talk.system is None:
        note("no system turn; /system TEXT sets one")
        return
    note("no system turn" if talk.system is None else f"system: {talk.system}")


def save(talk: Talk, screen: Screen, text: str) -> None:
    name = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    if not name:
        raise UserError("names no file", key="/save", fix="/save FILE.jsonl")
    path = Path(name).expanduser()
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        raise UserError("would not be read as JSON lines", path=name, key="/save", fix=f"/save {name}.jsonl")
    cut = talk.save(path)
    note(f"saved to {shown_path(path)}: a row of messages, for ft sft")
    if cut:
        note(f"{cut} of {len(talk.exchanges)} answers are not whole, and marked as not to be trained on (train: false)")


def adapter(talk: Talk, screen: Screen, text: str) -> None:
    if text:
        talk.switch(text)
    elif not talk.names:
        raise UserError("no adapter is loaded", key="/adapter", fix="start with --adapter NAME=PATH")
    note(talk.who())


WORDS = {"on": True, "off": False}
SHOWING = "show_thinking"
NUMBERS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


def params(talk: Talk, screen: Screen, text: str) -> None:
    """/params, or /params KEY VALUE …, or KEY=VALUE …"""
    words = text.replace("=", " ").split()
    if len(words) % 2:
        raise UserError(f"{words[-1]} has no value", key="/params", fix="/params temperature 0.7")
    given = dict(zip(words[::2], words[1::2], strict=True))
    known = (*NUMBERS, "max_new_tokens", "thinking", SHOWING)
    for key in given.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1)
        raise UserError(
            f"no setting {key}", key="/params", fix=f"did you mean {near[0]}?" if near else ", ".join(known)
        )
    numbers = {key: number(key, given[key]) for key in NUMBERS if key in given}
    if numbers:
        valid(talk.how, numbers)
    longest = whole_number("max_new_tokens", given["max_new_tokens"]) if "max_new_tokens" in given else None
    switches = {key: switch(key, given[key]) for key in ("thinking", SHOWING) if key in given}
    if "thinking" in switches:
        talk.set_thinking(switches["thinking"])
    if numbers:
        talk.set_generation(numbers)
    talk.max_new_tokens = longest or talk.max_new_tokens
    screen.hidden = not switches[SHOWING] if SHOWING in switches else screen.hidden
    settings = {**talk.settings(), SHOWING: "off" if screen.hidden else "on"}
    note(", ".join(f"{key} {value}" for key, value in settings.items() if key != "num_beams"))


def valid(how: GenerationConfig, given: dict[str, Any]) -> None:
    """UserError for values that cannot be, and for those that do nothing beside the rest."""
    try:
        found = GenerationConfig(**{**how.model_dump(), **given})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(first["msg"], key=f"/params {first['loc'][0]}", fix="give another value") from None
    if idle := next((key for key in ("top_k", "top_p", "seed") if key in given and not found.drawn), None):
        fix = "give a temperature above 0, too"
        raise UserError("has no effect: answers are greedy", key=f"/params {idle}", fix=fix)


def number(key: str, text: str) -> float | int:
    try:
        found = int(text) if key in ("top_k", "seed") else float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{text} is no number that it can be", key=f"/params {key}", fix=f"/params {key} 1")
    return found


def whole_number(key: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError(f"{text} is no number of tokens", key=f"/params {key}", fix=f"/params {key} 512")
    return int(text)


def switch(key: str, text: str) -> bool:
    if text not in WORDS:
        raise UserError(f"unknown word {text!r}", key=f"/params {key}", fix="one of on, off")
    return WORDS[text]


def show_help(talk: Talk, screen: Screen, text: str) -> None:
    for name, (_, usage, what) in ORDERS.items():
        note(f"/{f'{name} {usage}'.strip():<20} {what}")
    for sign, what in SIGNS.items():
        note(f"{sign:<21} {what}")


SIGNS = {
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
    BLOCK: "begins and ends a text of several lines; a line that ends in \\ goes on in the next",
    "//": "begins a message that begins with a slash",
}
ORDERS: dict[str, tuple[Callable[[Talk, Screen, str], None], str, str]] = {
    "help": (show_help, "", "this list"),
    "reset": (reset, "", "forget the conversation; the system turn stays"),
    "undo": (undo, "", "forget the last question and its answer"),
    "system": (system, "TEXT", 'set the system turn, "" takes it away; without a text show it'),
    "params": (params, "KEY VALUE", "set how answers are written; without a key show it"),
    "adapter": (adapter, "NAME", "who answers from now on; without a name list them"),
    "save": (save, "FILE.jsonl", "the conversation as a row that ft sft trains on, in a new file"),
}
WITHOUT_TEXT = ("help", "reset", "undo")


def do(talk: Talk, screen: Screen, name: str, text: str) -> None:
    """UserError for a command that there is not: it is not sent to the model."""
    name = "help" if name == "?" else name
    if name not in ORDERS:
        near = difflib.get_close_matches(name, (*ORDERS, *LEAVING), n=1)
        fix = f"did you mean /{near[0]}?" if near else "/help lists them"
        raise UserError(f"no command /{name}", fix=f"{fix} (// begins a message that begins with a slash)")
    if text and name in WITHOUT_TEXT:
        what = f"takes no text, and there is {text.splitlines()[0][:40]!r}"
        raise UserError(what, key=f"/{name}", fix="leave it out")
    ORDERS[name][0](talk, screen, text)
