"""uvicorn with our own end: what runs is finished, the rest is refused, and a second signal stops."""

from __future__ import annotations

import logging
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from finetune.errors import Interrupted
from finetune.serving.engine import Engine
from finetune.terminal.progress import warn

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
        self.stopped = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In place of uvicorn's, which closes the door at once: a client in the queue would see a broken connection."""
        if self.engine.closing:
            self.stopped = self.force_exit = self.should_exit = True
            self.engine.abort()
            return
        # In a thread: the signal may have come while this one holds the queue's lock.
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        warn("closing: what runs is finished, everything else refused; once more stops at once")
        self.engine.close(self._at_rest)

    def _at_rest(self) -> None:
        self.should_exit = True

    def serve_on(self, listener: socket.socket) -> None:
        """Until it is told to end. Interrupted where it was told twice."""
        self.engine.thread.start()
        self.run(sockets=[listener])
        if self.stopped:
            raise Interrupted("stopped; what was being written is lost")
