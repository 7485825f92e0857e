"""bash with an `ft` that starts at once: a process that has imported everything answers it, forked for each command.

A page's blocks run as they stand, pipes, variables and `&&` included, without eight seconds of imports a line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINE = "import sys; sys.path[:0] = {path!r}; import docs_shell; docs_shell.{call}"
ENVIRONMENT = {**os.environ, "COLUMNS": "120"}  # rich's consoles look once, when they are made
CLIENT = f"""#!{sys.executable} -IS
import array, json, os, socket, sys
name = os.path.basename(sys.argv[0])
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["DOCS_SHELL"])
asked = json.dumps([name, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(asked).to_bytes(8)], [0, 1, 2])
server.sendall(asked)
sys.exit(int(server.recv(8) or b"70"))
"""


class Shell:
    """more: [(how a command line begins, the words that are put behind it then)]."""

    def __init__(self, folder: Path, more: list[tuple[str, list[str]]]) -> None:
        self.address = str(folder / "socket")
        self.scripts = folder / "bin"
        self.scripts.mkdir()
        for name in ("ft", "python"):
            (self.scripts / name).write_text(CLIENT, encoding="utf-8")
            (self.scripts / name).chmod(0o755)
        path = [str(ROOT / "tests"), str(ROOT)]
        line = LINE.format(path=path, call=f"serve({self.address!r}, {more!r})")
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", line], stdout=log, stderr=log, env=ENVIRONMENT)
        while not Path(self.address).exists():
            assert self.process.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.05)

    def run(self, text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.scripts}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", text], cwd=folder, capture_output=True, text=True, input="",
            env={**ENVIRONMENT, "PATH": path, "DOCS_SHELL": self.address, **environment},
        )  # fmt: skip

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def serve(address: str, more: list[tuple[str, list[str]]]) -> None:
    """Answers commands, each in a fork that has the asking shell's streams, folder and environment."""
    import conftest
    import matplotlib.figure
    import peft  # noqa: F401
    import torch  # noqa: F401
    import trl  # noqa: F401

    import finetune.commands.evaluate
    import finetune.commands.merge
    import finetune.commands.ppo
    import finetune.commands.sft
    import finetune.planning.sizing
    import finetune.report.picture  # noqa: F401

    assert matplotlib.figure
    conftest.shorten(setattr)
    server = socket.socket(socket.AF_UNIX)
    server.bind(address + ".new")
    server.listen(8)
    os.rename(address + ".new", address)
    signal.signal(signal.SIGCHLD, lambda *_: reap())
    server.settimeout(5)
    parent = os.getppid()
    while os.getppid() == parent:  # a killed test ends it, too
        try:
            asking, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            answer(asking, more)
        asking.close()


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def answer(asking: socket.socket, more: list[tuple[str, list[str]]]) -> None:
    size, streams, _, _ = socket.recv_fds(asking, 8, 3)
    text = asking.makefile("rb").read(int.from_bytes(size))
    name, words, folder, environment = json.loads(text)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, closefd=False) for i, mode in enumerate("rww"))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code = 70
    try:
        line = " ".join(words)
        code = run(
            name, [*words, *(word for begin, put in more if name == "ft" and re.match(begin, line) for word in put)]
        )
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        asking.sendall(str(code).encode())
        os._exit(0)


def run(name: str, words: list[str]) -> int:
    """The exit code."""
    from finetune.cli import main

    try:
        if name == "ft":
            sys.argv = ["ft", *words]
            main()
        else:
            exec(compile(words[-1], "block", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
