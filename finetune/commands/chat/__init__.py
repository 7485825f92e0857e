"""`ft chat`: a conversation in the terminal, streamed; from a pipe or a file, one answer after another.

typed.py reads messages and commands, orders.py does the commands, talk.py holds the conversation and who answers,
screen.py shows answers.
"""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.commands.chat import orders
from finetune.commands.chat.screen import Screen
from finetune.commands.chat.talk import BASE, Talk
from finetune.commands.chat.typed import Typed, Typing
from finetune.errors import FinetuneError, UserError
from finetune.evaluation.answering import tell_formats
from finetune.evaluation.options import overridden
from finetune.evaluation.streaming import Stop
from finetune.evaluation.targets import Target, bases_of
from finetune.evaluation.writers import changes_base, load, share, targets_of, writer_of
from finetune.recipe.sections import GenerationConfig
from finetune.terminal.progress import console, note, warn


def run(
    runs: Sequence[str] = (), *, model: str | None = None, adapters: dict[str, str] | None = None,
    system: str | None = None, options: dict[str, Any] | None = None, max_new_tokens: int = 512,
    thinking: str | None = None, hide_thinking: bool = False, versus_base: bool = False,
) -> None:  # fmt: skip
    """
    Args:
        adapters: by name. options: keys of eval.generation.
    """
    targets = targets_of(runs, model, adapters or {})
    how = settings_of(targets[0], options or {})
    talk = made(targets, versus_base, thinking)
    talk.how, talk.max_new_tokens, talk.system = how, max_new_tokens, system
    talk.check_system()
    load([*talk.writers.values()])
    beside(talk)
    if how.chosen != GenerationConfig().chosen:
        note(f"answers: {how}")
    converse(talk, Screen(hide_thinking), Typing())


def settings_of(target: Target, options: dict[str, Any]) -> GenerationConfig:
    """How the run's recipe (eval.generation) and the options want answers; without a seed drawn anew."""
    how = overridden(target.eval.generation, options)
    if how.num_beams > 1:
        note(f"eval.generation.num_beams {how.num_beams} is not followed: an answer is shown while it is written")
    told = target.eval.generation.drawn or options.get("seed") is not None
    return how.model_copy(update={"num_beams": 1, "seed": how.seed if told else secrets.randbelow(1 << 31)})


def made(targets: Sequence[Target], versus_base: bool, thinking: str | None) -> Talk:
    """Who answers, not yet loaded. UserError where there is no base to compare with."""
    writers = {target.name: writer_of(target, thinking=thinking) for target in targets}
    base, first = None, targets[0]
    if BASE in writers and (versus_base or first.adapter is not None):
        what = f"{BASE} is the model without adapters here"
        raise UserError(what, path=first.name, key="--adapter", fix="give it another name: --adapter NAME=PATH")
    if versus_base or (first.adapter is not None and not changes_base(first)):
        base = writer_of(bases_of([first], "--versus-base")[0], thinking=thinking)
    tell_formats(writers.values())
    return Talk(writers, first.name, base, versus_base)


def beside(talk: Talk) -> None:
    """The base, on what is loaded already where its adapters can be switched off."""
    first = next(iter(talk.writers.values()))
    if talk.base is not None and first.target.adapter is not None and not changes_base(first.target):
        share(first, talk.base)
    elif talk.base is not None:
        note("the base is loaded beside it")
        load([talk.base])


def converse(talk: Talk, screen: Screen, typing: Typing) -> None:
    """Until the input ends, or somebody leaves. From a pipe the first thing that cannot be done ends it."""
    if typing.interactive:
        note('/help lists the commands; """ begins and ends a text of several lines')
        if talk.versus or len(talk.writers) > 1:
            note(talk.who())
    again = False  # Ctrl-C was pressed last
    while True:
        try:
            typed = typing.read()
        except EOFError:
            if typing.interactive:
                console.print()
            return
        except KeyboardInterrupt:
            if not typing.interactive:
                raise
            console.print()
            if again:
                return
            note("Ctrl-C again leaves, as Ctrl-D and /exit do")
            again = True
            continue
        except UserError as error:
            if not typing.interactive:
                raise
            warn("; ".join(error.lines()))
            continue
        again = False
        try:
            if typed.order in orders.LEAVING:
                return
            again = answered(talk, screen, typed, typing.interactive)
        except FinetuneError as error:  # the turn is forgotten: its message may be what went wrong
            if not typing.interactive:
                raise
            warn("; ".join(error.lines()))


def answered(talk: Talk, screen: Screen, typed: Typed, interactive: bool) -> bool:
    """Do a command, or have a message answered; True when Ctrl-C stopped the answer."""
    if typed.order is not None:
        orders.do(talk, screen, typed.order, typed.text)
        return False
    if not typed.text.strip():
        return False
    with screen.answers([writer.target.name for writer in talk.sides]) as shows, stopped_by_ctrl_c(interactive) as stop:
        exchange = talk.ask(typed.text, shows, stop)
    stopped = exchange.stopped
    if stopped and not all(answer["content"] or "reasoning_content" in answer for answer in exchange.answers):
        talk.exchanges.pop()
        note("stopped; the question is forgotten, since nothing was answered")
    elif stopped:
        note("stopped")
    elif not all(exchange.whole):
        note(f"cut at {talk.max_new_tokens} tokens or where the model's room ends; /params max_new_tokens N sets it")
    elif interactive and not any(answer["content"] for answer in exchange.answers):
        note("the answer is empty")
    return stopped


@contextmanager
def stopped_by_ctrl_c(interactive: bool) -> Iterator[Stop | None]:
    """At a terminal the first Ctrl-C lets the model finish its token, the next one waits no longer."""
    if not interactive or threading.current_thread() is not threading.main_thread():
        yield None
        return
    stop = Stop()

    def interrupt(*_: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
