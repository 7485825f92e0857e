"""Requests wait in a bounded queue; a thread takes those of one model together and writes their answers in a batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from finetune.adapters.methods import sees_padding
from finetune.adapters.multiple import activated
from finetune.evaluation.answering import Writer
from finetune.evaluation.generation import answer, left_pad, stop_ids
from finetune.models.hardware import input_device
from finetune.serving.rows import Batch, Row

GATHER = 0.005  # seconds: requests that come together are prepared one after another, and should not just miss a batch


class Full(Exception):
    """The queue is."""


class Closing(Exception):
    """The server is; nothing more is begun."""


class Failed(Exception):
    """The model could not go on; says where, and nothing of what was asked."""


class Engine:
    def __init__(self, writers: Mapping[str, Writer], batch_size: int, longest_queue: int) -> None:
        """writers: by model name, all on one base in memory."""
        self.writers, self.batch_size, self.longest_queue = writers, batch_size, longest_queue
        self.waiting: deque[tuple[str, Row]] = deque()
        self.running: list[Row] = []
        self.closing = False
        self.changed = threading.Condition()
        self.at_rest: Callable[[], None] = lambda: None
        self.thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self.failure: Callable[[BaseException], None] = lambda error: None
        """Told of what went wrong in a batch."""

    def submit(self, model: str, rows: Sequence[Row]) -> None:
        """All of a request's, or none: Full, Closing."""
        with self.changed:
            if self.closing:
                raise Closing
            if len(self.waiting) + len(rows) > self.longest_queue:
                raise Full
            self.waiting.extend((model, row) for row in rows)
            self.changed.notify()

    def close(self, at_rest: Callable[[], None]) -> None:
        """Begin nothing more, refuse what waits, and call when what runs is done."""
        with self.changed:
            self.closing, self.at_rest = True, at_rest
            refused, self.waiting = [row for _, row in self.waiting], deque()
            self.changed.notify()
        for row in refused:
            row.put(Closing())

    def abort(self) -> None:
        """What runs ends with its next token, and whoever waits for it is told now."""
        for row in list(self.running):
            row.gone = True
            if not row.done:
                row.put(Closing())

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self.changed:
                idle = not self.waiting
                while not self.waiting and not self.closing:
                    self.changed.wait()
                if self.closing:
                    break
            if idle:
                self._gather()
            with self.changed:
                model, self.running = self._next()
            try:
                if self.running:
                    self._write(self.writers[model], self.running)
            except BaseException as error:  # of a thread nobody would see it, and all would wait for ever
                self.failure(error)
                for row in self.running:
                    if not row.done:
                        row.put(Failed(type(error).__name__))
            self.running = []
        self.at_rest()

    def _gather(self) -> None:
        """Until nobody has come for a moment, or a batch is full."""
        before = -1
        while before < len(self.waiting) < self.batch_size:
            before = len(self.waiting)
            time.sleep(GATHER)

    def _next(self) -> tuple[str, list[Row]]:
        """The oldest that waits, and those of the same model behind it."""
        live = [(model, row) for model, row in self.waiting if not row.gone]
        if not live:
            self.waiting.clear()
            return "", []
        model, first = live[0]
        network = self.writers[model].network
        assert network is not None
        with activated(network) as adapted:
            equal = sees_padding(adapted)
        alike = [row for name, row in live if name == model and (not equal or len(row.prompt) == len(first.prompt))]
        chosen = alike[: self.batch_size]
        taken = set(map(id, chosen))
        self.waiting = deque((name, row) for name, row in live if id(row) not in taken)
        return model, chosen

    def _write(self, writer: Writer, rows: list[Row]) -> None:
        encoder = writer.prompter.encoder
        assert writer.network is not None
        with activated(writer.network) as model, torch.inference_mode():
            ends, pad = stop_ids(model, encoder), encoder.tokenizer.pad_token_id
            ids, mask = left_pad([row.prompt for row in rows], pad, input_device(model))
            batch, room = Batch(rows, ends, mask), max(row.room for row in rows)
            answer(
                model, ids, mask, room, ends, pad, processors=[batch.scores], stopping_criteria=[batch.taken],
            )  # fmt: skip
        for row in rows:
            if not row.done:  # a model that ends by itself
                row.close("length")
