"""A part of a command in a process of its own, and the signals that stop both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune import ranks

PART = "--part"
"""Before a command that is a part of another one: the whole says what to type next, the part does not."""
HANGUP = getattr(signal, "SIGHUP", None)  # not on Windows


def run(*arguments: str, module: str = "finetune", shown: bool = False) -> tuple[int, str]:
    """(exit code, what was said on stderr) of `python -m module …`; a negative code is the signal that ended it.

    The process gets every signal that stops this one, and the time it wants to end: subprocess.run gives it a quarter
    of a second after Ctrl-C, a step may take longer, and the checkpoint comes after. The code is 130 then.

    Args:
        shown: its output goes where ours goes; otherwise stdout nowhere, and stderr is what is returned.
    """
    ours = module == "finetune"
    command = [sys.executable, *(["-P"] if ours else []), "-m", module, *([PART] if ours else []), *arguments]
    terminals, got = at_terminal(), []
    process: subprocess.Popen[str] | None = None

    def pass_on(number: int, frame: Any) -> None:
        if number == HANGUP:
            leave(terminals)
        got.append(number)
        if process is not None:
            process.send_signal(number)

    before = [(number, signal.signal(number, pass_on)) for number in stopping()]
    environment = {**ranks.without(), "PYTHONPATH": python_path(), ranks.LAUNCHER: str(os.getpid())}
    try:
        # Its own group, or the terminal's Ctrl-C would reach it a second time.
        process = subprocess.Popen(
            command, process_group=0, text=True, errors="replace", stdout=None if shown else subprocess.DEVNULL,
            stderr=None if shown else subprocess.PIPE, env=environment,
        )  # fmt: skip
        for number in got:  # while it was being started
            process.send_signal(number)
        said = process.communicate()[1]
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    return 130 if got else process.returncode, (said or "").strip()


def python_path() -> str:
    """PYTHONPATH of a process that runs this package with -P: `python -m finetune` alone would run a finetune.py of the
    working directory."""
    package = Path(__file__).parent.parent
    return os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextmanager
def as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does: what was begun is put in order, and how to go on is said."""
    if threading.current_thread() is not threading.main_thread():  # which gets the signals
        yield
        return
    terminals = at_terminal()

    def stop(number: int, frame: Any) -> None:
        if number == HANGUP:
            leave(terminals)
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, stop)) for number in stopping() if number != signal.SIGINT]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def at_terminal() -> list[int]:
    """Which of stdout and stderr is a terminal."""
    return [fd for fd in (1, 2) if os.isatty(fd)]


def leave(terminals: list[int]) -> None:
    """After a hang-up: writing there would end the run before its checkpoint is saved."""
    with open(os.devnull, "wb") as nowhere:
        for fd in terminals:
            os.dup2(nowhere.fileno(), fd)


def stopping() -> list[signal.Signals]:
    """The signals at which a run saves a checkpoint; not a hang-up that is ignored (nohup). None in another thread than
    the main one, which gets them."""
    if threading.current_thread() is not threading.main_thread():
        return []
    found = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        found.append(HANGUP)
    return found
