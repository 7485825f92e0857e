"""How a request ends: with its answer, whole or as a stream, or with what came before that."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from finetune.serving.asking import Asked
from finetune.serving.bodies import ApiError
from finetune.serving.engine import Closing, Failed, Full
from finetune.serving.replies import Chat
from finetune.serving.rows import Event, Piece


class Gone(Exception):
    """The client hung up."""


class Late(Exception):
    """The request took longer than it may."""


def refusal(error: Exception) -> ApiError:
    again = {"retry-after": "1"}
    if isinstance(error, Full):
        what = "too many requests wait: try again in a moment"
        return ApiError(what, status=429, code="rate_limit_exceeded", kind="rate_limit_error", headers=again)
    if isinstance(error, Closing):
        return ApiError("the server is closing", status=503, code="closing", kind="server_error", headers=again)
    if isinstance(error, Late):
        stop = {"x-should-retry": "false"}  # it would only be late again
        return ApiError("the answer took too long", status=408, code="timeout", kind="timeout_error", headers=stop)
    return ApiError(f"the model could not go on ({error})", status=500, kind="server_error")


class Answering:
    """The pieces of one request's rows as they come out of the other thread, and what may cut them short."""

    def __init__(self, request: Request, deadline: float) -> None:
        self.request, self.deadline = request, deadline
        self.loop = asyncio.get_running_loop()
        self.come: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.rows: list[Any] = []
        self.left = 0
        self.why = ""
        """It ended before its answer did."""
        self.watching: list[Any] = []

    @property
    def written(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    def put(self, number: int) -> Callable[[Event], None]:
        """For another thread: where the pieces of row `number` go."""

        def hand_over(event: Event) -> None:
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.come.put_nowait, (number, event))

        return hand_over

    def begin(self, asked: Asked) -> None:
        self.rows, self.left = asked.rows, len(asked.rows)
        left = max(0.0, self.deadline - time.monotonic())
        late = self.loop.call_later(left, self.come.put_nowait, (0, Late()))
        self.watching = [late, asyncio.ensure_future(self._watch())]

    def end(self) -> None:
        """Nobody waits any more; what is still being written stops."""
        for row in self.rows:
            row.gone = True
        for one in self.watching:
            one.cancel()

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.come.put_nowait((0, Gone()))

    async def next(self) -> tuple[int, Piece]:
        """(number of the row, piece). Raises what ended the request before its answer."""
        number, event = await self.come.get()
        if isinstance(event, Exception):
            raise event
        self.left -= event.finish is not None
        return number, event

    async def whole(self) -> list[Piece]:
        """The last piece of each row, which holds all of it where rows are not live."""
        found: dict[int, Piece] = {}
        while self.left:
            number, piece = await self.next()
            found[number] = piece
        return [found[number] for number in sorted(found)]


async def stream(answering: Answering, made: Chat, first: tuple[int, Piece], usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events, one for each piece."""
    counts = [0] * len(answering.rows)
    try:
        for number in range(len(answering.rows)):
            if (head := made.first(number)) is not None:
                yield event(made.streamed([head]))
        number, piece = first
        while True:
            counts[number] = piece.count
            yield event(made.streamed([made.part(number, piece)]))
            if not answering.left:
                break
            number, piece = await answering.next()
        if usage:
            yield event(made.streamed([], made.usage(counts)))
        yield b"data: [DONE]\n\n"
    except Gone:
        answering.why = ", hung up"
    except (Full, Closing, Failed, Late) as error:  # the status is sent already
        answering.why = f", {type(error).__name__.lower()}"
        yield event(refusal(error).body())


class EventStream(StreamingResponse):
    """Ends after `seconds` also where the client does not read, and tells its end however it comes."""

    def __init__(self, events: AsyncIterator[bytes], seconds: float, ended: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.seconds, self.ended = seconds, ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self.seconds + 1):
                await super().__call__(scope, receive, send)
        except (TimeoutError, ClientDisconnect):
            pass
        finally:
            self.ended()


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
