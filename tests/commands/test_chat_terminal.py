"""`ft chat` at a terminal, as it is typed: arrow keys, pasted lines, Ctrl-C."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
CTRL_C, UP = b"\x03", b"\x1b[A"
PASTED = b"\x1b[200~one\ntwo\x1b[201~"


QUIET = 0.5
"""Seconds without output after which the program waits for keys; nothing is asserted of them."""
WAITED = 10.0
"""Seconds after which Ctrl-C is helped."""
NOTHING = b"\x05"  # Ctrl-E: to the end of the line, where the cursor is
PROMPT = r"(^|[\r\n])> (\x1b\[\?2004h)?$"


class Terminal:
    def __init__(self, *arguments: object) -> None:
        import fcntl
        import termios

        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\x00\x64\x00\x00\x00\x00\x00")  # 24 lines, 100 columns

        def own_it() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune", *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=own_it, env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def type(self, keys: bytes, then: str, quiet: bool = True, seconds: float = 120) -> str:
        """What is written up to `then`, a pattern, and with `quiet` until nothing more comes: an answer may look like a
        prompt. Ctrl-C pressed while input() is being set up, which takes long on a busy machine, is handled only with
        the next key (CPython, Modules/readline.c): one that does nothing is pressed where nothing comes of it."""
        os.write(self.ours, keys)
        begun, read, gone, there, pressed = time.monotonic(), b"", False, None, not keys.endswith(CTRL_C)
        while not gone and time.monotonic() - begun < seconds:
            more = bool(select.select([self.ours], [], [], QUIET)[0])
            if not pressed and time.monotonic() - begun > WAITED:
                os.write(self.ours, NOTHING)
                pressed = True
            if more:
                try:
                    read += os.read(self.ours, 1 << 16)
                except OSError:  # the other end is closed
                    gone = True
            there = re.search(then, read.decode(errors="ignore"))
            if there and not (quiet and more):
                break
        self.text = read.decode(errors="replace")
        assert there, self.text
        return self.text


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "said.jsonl"
    terminal = Terminal("chat", base, "--max-new-tokens", "400", "--temperature", "3", "--seed", "2")
    try:
        terminal.type(b"", PROMPT)
        terminal.type(b"hello\r", r"hello\r\n[^\n]*\S", quiet=False)
        assert "stopped" in terminal.type(CTRL_C, PROMPT)
        terminal.type(b"/params max_new_tokens 4\r", PROMPT)
        assert "hello" in terminal.type(UP + UP, "hello")
        assert "cut at 4 tokens" in terminal.type(b" again\r", PROMPT)
        terminal.type(PASTED + b"\r", PROMPT)
        assert "no command /sav" in terminal.type(f"/sav {file}\r".encode(), PROMPT)
        terminal.type(f"/save {file}\r".encode(), PROMPT)
        assert "Ctrl-C again leaves" in terminal.type(b"half a line" + CTRL_C, PROMPT)
        assert "> " in terminal.type(b"\r", PROMPT)
        terminal.type(CTRL_C, PROMPT)
        terminal.type(CTRL_C, r"\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    text = file.read_text()
    assert [said for said in ("hello", "hello again", "one\\ntwo", "half") if f'"{said}"' in text] == [
        "hello", "hello again", "one\\ntwo",
    ]  # fmt: skip
