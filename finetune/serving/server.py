"""uvicorn with our own end: what runs is finished, the rest is refused, and a second signal stops."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from finetune.child import HANGUP, at_terminal, leave, stopping
from finetune.errors import Interrupted
from finetune.serving.engine import Engine
from finetune.terminal.progress import note, warn

LAST_SECONDS = 10  # for answers that are written but not yet read


class Server(uvicorn.Server):
    def __init__(self, app: FastAPI, engine: Engine) -> None:
        # What is asked stands in no log: uvicorn's own lines hold paths, and tracebacks hold anything.
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="off",
            proxy_headers=False, timeout_graceful_shutdown=LAST_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self.engine = engine
        self.asked = self.stopped = False
        self.terminals = at_terminal()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which closes the door at once: a client in the queue would see a broken connection."""
        if sig == HANGUP:
            leave(self.terminals)
        if not self.asked:
            self.asked = True
            # In a thread: the signal may have come while this one holds the queue's lock.
            threading.Thread(target=self._close, daemon=True).start()
        elif sig != HANGUP:  # which comes beside others
            self.stopped = self.force_exit = self.should_exit = True
            self.engine.abort()

    def _close(self) -> None:
        warn("closing: what runs is finished, everything else refused; once more stops at once")
        self.engine.close(self._at_rest)

    def _at_rest(self) -> None:
        self.should_exit = True

    def serve_on(self, listener: socket.socket) -> None:
        """Until it is told to end; told twice, the process ends here."""
        self.engine.thread.start()
        for number in stopping():  # uvicorn knows no hang-up, and gives these back when it has ended
            signal.signal(number, self.handle_exit)
        self.run(sockets=[listener])
        if self.stopped:
            note("stopped; what was being written is lost", "yellow")
            sys.stderr.flush()
            os._exit(Interrupted.exit_code)  # Python's end would wait for a thread in the middle of a step
        for number in stopping():  # Python's own end takes a second with torch, and all is done
            signal.signal(number, signal.SIG_IGN)
