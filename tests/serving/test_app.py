"""The bounds of the server, on the app itself: a queue that stands still, late answers, what schemathesis thinks of."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import checks

from finetune.evaluation.writers import load, targets_of, writer_of
from finetune.serving.app import Bounds, make_app
from finetune.serving.asking import Served
from finetune.serving.engine import Engine

Asked = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def served(base: Path) -> Served:
    writer = writer_of(targets_of([], str(base), {})[0])
    load([writer])
    return Served.of("m", writer, writer.target.eval.generation, longest_answer=8, most_rows=4)


BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def app_of(served: Served, queue: int = 4, running: bool = False, key: str | None = None, **bounds: Any) -> Any:
    engine = Engine({"m": served.writer}, 4, queue)
    if running:
        engine.thread.start()
    return make_app({"m": served}, engine, Bounds(**{"seconds": 60, **bounds}), key), engine


async def post(app: Any, body: Any = BODY, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.post(path, json=body, headers=headers)


def test_a_full_queue_and_a_late_answer(served: Served) -> None:
    """The engine does not run: everything waits."""
    app, engine = app_of(served, queue=3, seconds=0.5)

    async def many() -> list[httpx.Response]:
        first = [asyncio.create_task(post(app, {**BODY, "n": 2}))]
        while not engine.waiting:
            await asyncio.sleep(0.01)
        full = await post(app, {**BODY, "n": 2})
        one = await post(app, {**BODY, "n": 1})
        return [*await asyncio.gather(*first), full, one]

    late, full, one = asyncio.run(many())
    assert (late.status_code, full.status_code, one.status_code) == (408, 429, 408)
    assert (full.json()["error"]["code"], full.headers["retry-after"]) == ("rate_limit_exceeded", "1")
    assert late.headers["x-should-retry"] == "false"
    assert all(row.gone for _, row in engine.waiting)


def test_a_stream_that_ends_too_early_says_why(served: Served) -> None:
    app, engine = app_of(served, seconds=0.5)

    async def cut() -> httpx.Response:
        asked = asyncio.create_task(post(app, {**BODY, "stream": True}))
        while not engine.waiting:
            await asyncio.sleep(0.01)
        row = engine.waiting[0][1]
        while not row.new:
            row.live = True
            row.take(ord("a") - ord("!") + 3 + len(row.ids), frozenset())
            if row.ids:
                break
        return await asked

    events = [line.removeprefix("data: ") for line in asyncio.run(cut()).text.splitlines() if line]
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    assert len(events) == 3


def test_closing_refuses_what_waits_and_what_comes(served: Served) -> None:
    app, engine = app_of(served)
    ended: list[bool] = []

    async def closed() -> list[httpx.Response]:
        waiting = asyncio.create_task(post(app))
        while not engine.waiting:
            await asyncio.sleep(0.01)
        engine.close(lambda: ended.append(True))
        return [await waiting, await post(app)]

    assert [answer.status_code for answer in asyncio.run(closed())] == [503, 503]
    engine.thread.start()
    engine.thread.join(10)
    assert ended == [True]


def test_a_body_that_does_not_come(served: Served) -> None:
    app, _ = app_of(served, seconds=0.3)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=slow(), headers=headers)

    assert asyncio.run(ask()).status_code == 408


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer other", "Basic right", "Bearer right "])
def test_keys(served: Served, given: str) -> None:
    app, _ = app_of(served, key="right", body=10)
    status = asyncio.run(post(app, authorization=given)).status_code
    assert status == (413 if given.strip() == "Bearer right" else 401)


def test_a_failing_model_fails_its_requests_and_nothing_else(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.serving import engine as module

    app, engine = app_of(served, running=True)
    told: list[BaseException] = []
    engine.failure = told.append
    real = module.answer

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(module, "answer", broken)
    failed = asyncio.run(post(app))
    monkeypatch.setattr(module, "answer", real)
    assert (failed.status_code, "secret" in failed.text, len(told)) == (500, False, 1)
    assert asyncio.run(post(app)).status_code == 200


def test_an_answer_in_tool_calls(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model writes is put into its mouth; the prompt holds the tool."""
    from finetune.serving import engine as module

    tokenizer = served.writer.prompter.encoder.tokenizer
    text = 'I look.\n<tool_call>\n{"name": "find", "arguments": {"city": "世"}}\n</tool_call>'
    prompts: list[str] = []

    def spoken(
        model: Any, ids: Any, mask: Any, room: int, ends: Any, *rest: Any, stopping_criteria: Any, **more: Any
    ) -> None:
        prompts.append(tokenizer.decode(ids[0]))
        for token in [*tokenizer.encode(text, add_special_tokens=False), ends[0]]:
            stopping_criteria[0](ids.new_tensor([[token]] * len(ids)), None)

    monkeypatch.setattr(module, "answer", spoken)
    monkeypatch.setattr(served, "longest_answer", 100)
    tool = {"type": "function", "function": {"name": "find", "description": "d", "parameters": {"type": "object"}}}
    body = {**BODY, "tools": [tool], "max_tokens": 100}
    app, _ = app_of(served, running=True)
    choice = asyncio.run(post(app, body)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("find", {"city": "世"})
    assert '"name": "find"' in prompts[0]
    plain = asyncio.run(post(app, {**body, "tool_choice": "none"})).json()["choices"][0]
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", text)
    assert "find" not in prompts[1]
    streamed = asyncio.run(post(app, {**body, "stream": True})).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in streamed if line.startswith("data: {")]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert [delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta] == [0]
    again = [*BODY["messages"], {**choice["message"]}, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]  # type: ignore[misc]
    assert asyncio.run(post(app, {**body, "messages": again, "max_tokens": 9})).status_code == 200
    assert "sunny" in prompts[-1]


def test_what_the_server_lacks_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.serving import grammar

    app, _ = app_of(served)
    monkeypatch.setattr(grammar, "MODULE", "not_installed_anywhere")
    without = asyncio.run(post(app, {**BODY, "response_format": {"type": "json_object"}}))
    assert (without.status_code, "pip install" in without.json()["error"]["message"]) == (400, True)
    monkeypatch.setattr(served, "calls", None)
    tool = {"type": "function", "function": {"name": "find"}}
    assert asyncio.run(post(app, {**BODY, "tools": [tool]})).json()["error"]["param"] == "tools"
    monkeypatch.setattr(served, "longest_prompt", 5)
    assert asyncio.run(post(app)).json()["error"]["code"] == "context_length_exceeded"


def test_whatever_is_sent(served: Served) -> None:
    """No request makes the server fail, or is answered otherwise than our own OpenAPI says."""
    app, engine = app_of(served, running=True)
    described = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 5
    wanted = [
        checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
        checks.response_schema_conformance,
    ]  # fmt: skip
    for operation in operations:
        is_post = operation.method == "post"  # the others have nothing that could be wrong
        for mode in schemathesis.GenerationMode if is_post else [schemathesis.GenerationMode.POSITIVE]:
            strategy = operation.as_strategy(generation_mode=mode)

            @hypothesis.given(case=strategy)
            @hypothesis.settings(
                max_examples=10, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True, database=None
            )
            def send(case: Any) -> None:
                case.validate_response(case.call(), checks=wanted)

            send()
    engine.close(lambda: None)
