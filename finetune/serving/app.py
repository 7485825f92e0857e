"""The HTTP side: who may ask, and what comes in."""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from finetune import __version__
from finetune.json_text import decode, reason
from finetune.serving import asking
from finetune.serving.answering import Answering, EventStream, Gone, Late, refusal, stream
from finetune.serving.asking import Asked, Served
from finetune.serving.bodies import ApiError, Body, ChatBody, CompletionBody, ErrorBody, parsed
from finetune.serving.engine import Closing, Engine, Failed, Full
from finetune.serving.replies import Chat, Completion
from finetune.terminal.progress import note

BODY_SECONDS = 30  # for a body that is on its way


@dataclass(frozen=True)
class Bounds:
    seconds: float = 600
    """For a request, from its first byte to its last."""
    body: int = 1 << 20
    """Bytes."""


def make_app(served: Mapping[str, Served], engine: Engine, bounds: Bounds, api_key: str | None = None) -> FastAPI:
    app = FastAPI(title="ft serve", version=__version__, docs_url=None, redoc_url=None)
    desk = Desk(served, engine, bounds)
    started = int(time.time())

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        what = {404: "no such path", 405: "not with this method"}.get(error.status_code, "not possible")
        return JSONResponse(ApiError(what).body(), error.status_code, error.headers)

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
            headers = {"www-authenticate": "Bearer"}
            raise ApiError("no or a wrong API key", status=401, code="invalid_api_key", headers=headers)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "ft"}

    @app.get("/health", responses={503: {"description": "closing"}})
    async def health() -> Response:
        alive = engine.thread.is_alive() and not engine.closing
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    @app.get("/v1/models", responses=refusals(401))
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [described(name) for name in served]})

    @app.get("/v1/models/{model:path}", responses=refusals(401, 404))
    async def model(request: Request, model: str) -> Response:
        check_key(request)
        return JSONResponse(described(desk.model(model).name))

    @app.post("/v1/chat/completions", **documented(ChatBody))
    async def chat(request: Request) -> Response:
        check_key(request)
        return await logged(request, lambda: desk.reply(request, ChatBody, asking.chat, Chat))

    @app.post("/v1/completions", **documented(CompletionBody))
    async def completions(request: Request) -> Response:
        check_key(request)
        return await logged(request, lambda: desk.reply(request, CompletionBody, asking.completion, Completion))

    described_by_fastapi = app.openapi
    app.openapi = lambda: openapi(described_by_fastapi, [*served])  # type: ignore[method-assign]
    return app


def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorBody} for code in codes}


REF = "#/components/schemas/{model}"


def documented(body: type[Body]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
        "responses": refusals(400, 401, 404, 408, 413, 415, 429, 500, 503),
    }


def openapi(make: Callable[[], dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The app's own description, with the bodies that FastAPI does not read."""
    found = make()
    for body in (ChatBody, CompletionBody):
        schema = body.model_json_schema(ref_template=REF)
        known = found["components"]["schemas"]
        known |= schema.pop("$defs", {})
        schema["properties"]["model"]["enum"] = list(names)
        known[body.__name__] = schema
    return found


async def logged(request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """Errors become answers, and a line: what was asked stands in none."""
    try:
        return await answer()
    except ApiError as error:
        note(f"{request.url.path} {error.status}")
        raise
    except (Gone, ClientDisconnect):
        note(f"{request.url.path} hung up")
        return Response(status_code=499)
    except Exception as error:
        note(f"{request.url.path} 500 {place_of(error)}", "red")
        raise ApiError("the server failed", status=500, kind="server_error") from None


def place_of(error: BaseException) -> str:
    """Its type and where it was raised; its words may be those of a request."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


class Desk:
    """Where requests come in and answers go out."""

    def __init__(self, served: Mapping[str, Served], engine: Engine, bounds: Bounds) -> None:
        self.served, self.engine, self.bounds = served, engine, bounds
        self.most = engine.longest_queue + engine.batch_size  # requests that are read or answered at once
        self.here = 0
        # One after another: a fast tokenizer is not made for several threads.
        self.preparing = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def model(self, name: str) -> Served:
        found = self.served.get(name)
        if found is None:
            what = f"no such model; there are {', '.join(self.served)}"
            raise ApiError(what, "model", status=404, code="model_not_found")
        return found

    async def reply(self, request: Request, kind: type[Any], ask: Callable[..., Asked], shape: type[Chat]) -> Response:
        begun = time.monotonic()
        if self.engine.closing:
            raise refusal(Closing())
        if self.here >= self.most:
            raise refusal(Full())
        self.here += 1
        answering = Answering(request, begun + self.bounds.seconds)
        try:
            body = parsed(kind, self._json(await self._body(request)))
            model = self.model(body.model)
            loop = asyncio.get_running_loop()
            asked = await loop.run_in_executor(self.preparing, ask, model, body, answering.put)
            self.engine.submit(model.name, asked.rows)
            answering.begin(asked)
            made = shape(model, asked)

            def ended() -> None:
                answering.end()
                self.here -= 1
                spent = f"{asked.prompt_tokens} + {answering.written} tokens, {time.monotonic() - begun:.2f} s"
                note(f"{request.url.path} {model.name}: {spent}{answering.why}")

            if body.stream:
                first = await answering.next()
                usage = body.stream_options is not None and bool(body.stream_options.include_usage)
                return EventStream(stream(answering, made, first, usage), self.bounds.seconds, ended)
            pieces = await answering.whole()
            response = JSONResponse(made.whole(pieces))
            ended()
            return response
        except BaseException as error:
            answering.end()
            self.here -= 1
            if isinstance(error, Full | Closing | Failed | Late):
                raise refusal(error) from None
            raise

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # no other site's page can send that without being asked
            raise ApiError("the content-type must be application/json", status=415)
        too_large = ApiError(f"the body is larger than {self.bounds.body:,} bytes", status=413)
        told = request.headers.get("content-length", "")
        if told.isdigit() and (len(told) > 18 or int(told) > self.bounds.body):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(min(BODY_SECONDS, self.bounds.seconds)):
                async for part in request.stream():
                    body += part
                    if len(body) > self.bounds.body:
                        raise too_large
        except TimeoutError:
            raise ApiError("the body took too long", status=408, code="timeout") from None
        return bytes(body)

    @staticmethod
    def _json(body: bytes) -> Any:
        try:
            return decode(body.decode())
        except UnicodeDecodeError:
            raise ApiError("the body is not UTF-8 text") from None
        except ValueError as error:
            said = reason(error)
            said = "a key that occurs twice" if "occurs twice" in said else said  # not with the client's words
            raise ApiError(f"the body is not JSON ({said})") from None
