"""`ft serve` as the official client sees it: one process, two adapters and their base by name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from conftest import ft, write_rows

KEY, SECRET = "test-key", "mauve-elephant-9157"
ROOM = 24


def adapter(path: Path, seed: int, size: float) -> Path:
    """A run of tiny-llama in float32 (where batches round alike), its LoRA of random weights of this size."""
    from peft import LoraConfig, get_peft_model

    from finetune.models import sources
    from finetune.models.loading import skeleton
    from finetune.recipe.sections import ModelConfig

    config = ModelConfig(name="tiny-llama", sanity_check=False)
    torch.manual_seed(seed)
    model = get_peft_model(
        skeleton(config).to_empty(device="cpu"),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=size if "lora_B" in name else 0.1)
    model.save_pretrained(path / "adapter")
    described = path / "adapter" / "adapter_config.json"
    told = {**json.loads(described.read_text()), "base_model_name_or_path": str(sources.folder(config))}
    described.write_text(json.dumps(told))
    recipe: dict[str, Any] = {
        "version": 1, "stage": "sft", "model": {"name": "tiny-llama", "dtype": "float32"},
        "data": {"train": "builtin:tickets/train"}, "adapter": {"method": "lora"}, "output": {"dir": str(path)},
    }  # fmt: skip
    (path / "recipe.yaml").write_text(json.dumps(recipe))
    return path


class Server:
    def __init__(self, where: Path, *options: str) -> None:
        self.log = where / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune", "serve", "--port", "0", *options],
                stdout=log, stderr=log, env={**os.environ, "FT_API_KEY": KEY},
            )  # fmt: skip
        for _ in range(1200):
            if "/v1" in self.said or self.process.poll() is not None:
                break
            time.sleep(0.1)
        assert self.process.poll() is None, self.said
        self.url = next(word for word in self.said.split() if word.endswith("/v1"))

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, **{"api_key": KEY, "max_retries": 0, **options})

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("adapters")
    return {name: adapter(where / f"the {name}", seed, 0.02) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes nothing: the base in float32, for ft generate."""
    return adapter(tmp_path_factory.mktemp("nothing") / "run", 2, 0.0)


@pytest.fixture(scope="module")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    named = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    started = Server(tmp_path_factory.mktemp("server"), "--model", "tiny-llama", *named, "--max-new-tokens", "460")
    yield started
    started.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


NAMES = ("a", "b", "tiny-llama")
QUESTIONS = [f"My order {i * 37} {word}" for i in range(4) for word in ("is late", "was broken when it came")]


def turns(text: str) -> Any:
    return [{"role": "user", "content": text}]


def asked(client: openai.OpenAI, model: str, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model=model, messages=turns(text), **{"max_tokens": ROOM, **options})


@pytest.fixture(scope="module")
def expected(
    adapters: dict[str, Path], nothing: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, str]]:
    """What `ft generate` answers: model -> question -> answer."""
    where = tmp_path_factory.mktemp("expected")
    data = write_rows(where / "rows.jsonl", [{"prompt": text} for text in QUESTIONS])
    named = {**adapters, "tiny-llama": nothing}
    options = [part for name, path in named.items() for part in ("--adapter", f"{name}={path}")]
    out = where / "out.jsonl"
    done = ft("generate", *options, "--data", data, "-o", out, "--max-new-tokens", ROOM)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {name: {row["prompt"]: row["prediction"][name] for row in rows} for name in named}


def test_models_by_name(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == list(NAMES)
    assert client.models.retrieve("b").id == "b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("c")
    with pytest.raises(openai.NotFoundError, match="there are a, b, tiny-llama") as error:
        asked(client, "gpt-4", "hi")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="other").models.list()
    assert httpx.get(server.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_32_at_once_get_the_answers_of_ft_generate(client: openai.OpenAI, expected: dict[str, dict[str, str]]) -> None:
    """Each of its own model, none lost, whatever they are batched with."""
    wanted = [(NAMES[i % 3], QUESTIONS[i % len(QUESTIONS)]) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda pair: asked(client, *pair), wanted))
    assert [answer.choices[0].message.content for answer in answers] == [expected[m][q] for m, q in wanted]
    assert [answer.model for answer in answers] == [model for model, _ in wanted]
    assert len({answer.id for answer in answers}) == 32
    for q in QUESTIONS[:2]:
        assert len({expected[name][q] for name in NAMES}) == 3, "the adapters answer differently"


def test_streams_say_the_same(client: openai.OpenAI, server: Server, expected: dict[str, dict[str, str]]) -> None:
    """Also of the asynchronous client, several at once."""
    chunks = list(asked(client, "a", QUESTIONS[0], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected["a"][QUESTIONS[0]]
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], ROOM)
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 5

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as many:

            async def one(model: str, text: str) -> str:
                stream = await many.chat.completions.create(
                    model=model, messages=turns(text), max_tokens=ROOM, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return list(await asyncio.gather(*(one(name, q) for name in NAMES for q in QUESTIONS[:3])))

    assert asyncio.run(several()) == [expected[name][q] for name in NAMES for q in QUESTIONS[:3]]


def test_a_drawn_answer_depends_on_its_seed_alone(client: openai.OpenAI, tmp_path: Path) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    alone = asked(client, "a", QUESTIONS[0], **options).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:  # beside others, of other settings
        others = [pool.submit(asked, client, "a", q, temperature=1.3) for q in QUESTIONS[1:]]
        again = pool.submit(asked, client, "a", QUESTIONS[0], **options, n=3).result()
        for other in others:
            other.result()
    texts = [choice.message.content for choice in again.choices]
    assert texts[0] == alone
    assert len(set(texts)) == 3
    assert (
        asked(client, "a", QUESTIONS[0], **options, max_tokens=6).choices[0].message.content
        == alone[: len(asked(client, "a", QUESTIONS[0], **options, max_tokens=6).choices[0].message.content)]
    )
    assert asked(client, "a", QUESTIONS[0], **{**options, "seed": 8}).choices[0].message.content != alone
    unseeded = {asked(client, "a", QUESTIONS[0], temperature=1.2).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_stop_texts_and_penalties(client: openai.OpenAI, expected: dict[str, dict[str, str]]) -> None:
    whole = expected["tiny-llama"][QUESTIONS[0]]
    stop = whole[5:8]
    cut = asked(client, "tiny-llama", QUESTIONS[0], stop=[stop, "never there"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < ROOM
    first = asked(client, "tiny-llama", QUESTIONS[0], max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    completion = client.completions.create(model="tiny-llama", prompt=[[5, 6, 7]], max_tokens=1, logprobs=2)
    assert completion.choices[0].logprobs is not None
    assert len(completion.choices[0].logprobs.top_logprobs[0]) == 2
    assert first.logprob <= 0
    for options in ({"presence_penalty": 2.0, "frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 5.0}}):
        assert asked(client, "tiny-llama", QUESTIONS[0], **options).choices[0].message.content != whole


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    """Whatever is done to the scores for drawing; the sum of a text's is what the model gives it."""
    from finetune.models.loading import load_model
    from finetune.models.tokenizers import load_tokenizer
    from finetune.recipe.sections import ModelConfig

    config = ModelConfig(name="tiny-llama", sanity_check=False)
    prompt = [5, 60, 7, 200]
    found = client.completions.create(
        model="tiny-llama", prompt=prompt, max_tokens=8, temperature=0.7, seed=3, logprobs=3, logit_bias={"9": 5},
        presence_penalty=1,
    ).choices[0]  # fmt: skip
    tokenizer = load_tokenizer(config)
    model = load_model(config, torch.float32)
    with torch.inference_mode():
        first = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    values, places = first.topk(3)
    assert found.logprobs is not None
    told = found.logprobs.top_logprobs[0]
    assert list(told.values()) == pytest.approx(values.tolist(), abs=1e-3)
    assert next(iter(told)) == tokenizer.decode([int(places[0])])
    biased = client.completions.create(model="tiny-llama", prompt=prompt, max_tokens=3, logit_bias={"40": 100})
    assert biased.choices[0].text == tokenizer.decode([40, 40, 40])


def test_completions_go_on_with_a_text(client: openai.OpenAI, nothing: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "My order was"}, {"text": "Paid"}])
    out = tmp_path / "out.jsonl"
    assert ft("generate", nothing, "--data", data, "-o", out, "--max-new-tokens", 10).returncode == 0
    wanted = [json.loads(line)["prediction"] for line in out.read_text(encoding="utf-8").splitlines()]
    found = client.completions.create(model="tiny-llama", prompt=["My order was", "Paid"], max_tokens=10, n=2)
    assert [c.text for c in found.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    chunks = client.completions.create(model="tiny-llama", prompt="Paid", max_tokens=10, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == wanted[1]


def test_json_that_follows_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"city": {"enum": ["Rome", "Paris"]}, "n": {"type": "integer"}},
        "required": ["city", "n"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    for seed in range(3):
        answer = asked(client, "a", QUESTIONS[0], response_format=wanted, temperature=1.5, seed=seed, max_tokens=200)
        if answer.choices[0].finish_reason == "stop":
            value = json.loads(answer.choices[0].message.content)
            assert value["city"] in ("Rome", "Paris")
            assert isinstance(value["n"], int)
            break
    else:
        pytest.fail("none of three answers ended")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        asked(
            client, "a", "x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
        )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"extra_body": {"reasoning_effort": "low"}}, "reasoning_effort is not followed"),
    ({"extra_body": {"min_p": 0.1}}, "min_p is not followed"),
    ({"tool_choice": "required", "tools": []}, "tool_choice must be auto or none"),
    ({"stop": ["1", "2", "3", "4", "5"]}, "stop must be a text"),
    ({"stop": ""}, "stop must be a text"),
    ({"n": 0}, "n: input should be"),
    ({"n": 65}, "answers in one request"),
    ({"temperature": "0"}, "temperature: input should be"),
    ({"logit_bias": {"x": 1}}, "is no token id"),
    ({"logit_bias": {"99999999": 1}}, "is no token id"),
    ({"max_tokens": 461}, "more than this server writes"),
    ({"max_tokens": 455, "messages": turns("a b c " * 30)}, "made for 512 tokens"),
    ({"messages": turns("x " * 600)}, "made for 512 tokens"),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "must be text"),
    ({"messages": [*turns("hi"), {"role": "assistant", "content": "x"}]}, "nothing is asked"),
    ({"messages": [{"role": "user", "content": "hi", "name": "Bob"}]}, "leaves out the name of turn 1"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"top_logprobs": 2}, "needs logprobs"),
    ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, "no such switch"),
    ({"extra_body": {"echo": True}}, "echo is not followed"),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_is_not_followed_is_refused_by_name(server: Server, options: dict[str, Any], told: str) -> None:
    body = {"model": "a", "messages": turns("hi"), "max_tokens": 4, **options}
    body |= body.pop("extra_body", {})
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx.post(f"{server.url}/chat/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["error"]["message"]


def test_what_openai_ignores_and_the_clients_own_messages_are_taken(client: openai.OpenAI) -> None:
    first = asked(client, "a", "hi", user="me", metadata={"a": "b"}, store=False, service_tier="auto", logit_bias={})
    message = first.choices[0].message.model_dump()
    again = client.chat.completions.create(
        model="a",
        messages=[*turns("hi"), message, *turns("and")],
        max_tokens=4,
        functions=None,  # type: ignore[arg-type]
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{broken", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"a": 1, "a": 2}', "application/json", 400),
        (b"[" * 5000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * ((1 << 20) + 1), "application/json", 413),
    ],
)
def test_malformed_bodies(server: Server, content: bytes, kind: str, status: int) -> None:
    headers = {"authorization": f"Bearer {KEY}", "content-type": kind}
    for body in (content, iter([content])):  # the second without a content-length
        answer = httpx.post(f"{server.url}/chat/completions", content=body, headers=headers)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_abandoned_answer_stops(client: openai.OpenAI, server: Server) -> None:
    before = server.said.count("hung up")
    with asked(client, "a", QUESTIONS[0], stream=True, max_tokens=440, temperature=0.1) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
    impatient = server.client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        asked(impatient, "a", QUESTIONS[0], max_tokens=440, temperature=0.1)
    for _ in range(600):
        if server.said.count("hung up") == before + 2:
            break
        time.sleep(0.05)
    assert server.said.count("hung up") == before + 2
    line = next(line for line in server.said.splitlines() if "hung up" in line and "tokens" in line)
    assert int(line.split(" tokens")[0].split()[-1]) < 440


def test_the_last_signal(client: openai.OpenAI, server: Server) -> None:
    """SIGTERM: what runs is finished, the rest refused; no child, and no text of a request in the log."""
    asked(client, "a", SECRET)
    stream = asked(client, "a", QUESTIONS[0], stream=True, max_tokens=400, temperature=0.1, seed=1)
    next(stream)
    assert psutil.Process(server.process.pid).children(recursive=True) == []
    server.process.send_signal(signal.SIGTERM)
    for _ in range(200):
        if "closing" in server.said:
            break
        time.sleep(0.01)
    with pytest.raises(openai.APIStatusError) as error:
        asked(client, "a", "too late")
    assert error.value.status_code == 503
    reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] in ("length", "stop")
    assert server.process.wait(60) == 0
    for text in (SECRET, QUESTIONS[0], "surrogate", "Bob", KEY):
        assert text not in server.said
    assert "Traceback" not in server.said


def test_kill_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """kill -9 leaves no child, and the port is free."""
    started = Server(tmp_path, str(base), "--max-new-tokens", "400")
    name = started.client().models.list().data[0].id
    assert name == base.name
    stream = asked(started.client(), name, "ab", stream=True, max_tokens=400, temperature=1.0)
    next(stream)
    process = psutil.Process(started.process.pid)
    family = [process, *process.children(recursive=True)]
    process.kill()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert (len(gone), alive) == (1, [])
    from finetune.serving import address

    address.check("127.0.0.1", int(started.url.removesuffix("/v1").rpartition(":")[2]))
    started.kill()


def test_a_second_signal_stops_at_once(base: Path, tmp_path: Path) -> None:
    """The first, here that of a closed terminal, finishes what runs: a long answer and a longer stream."""
    from finetune.serving import address

    started = Server(tmp_path, str(base), "--max-new-tokens", "400", "--batch-size", "2")
    client, name = started.client(), base.name
    long: dict[str, Any] = {"max_tokens": 400, "temperature": 1.0, "logit_bias": {"2": -100}}  # its end of turn
    stream = asked(client, name, "ab", stream=True, **long)
    next(stream)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(asked, client, name, f"{n}", **long) for n in range(3)]
        for _ in range(600):
            if len(psutil.Process(started.process.pid).net_connections()) > 4:  # all are there
                break
            time.sleep(0.05)
        for number, told in ((signal.SIGHUP, "closing"), (signal.SIGTERM, "stopped")):
            assert started.process.poll() is None
            assert told not in started.said
            started.process.send_signal(number)
            for _ in range(600):
                if told in started.said:
                    break
                time.sleep(0.05)
        assert started.process.wait(30) == 130
        with pytest.raises((openai.APIError, httpx.HTTPError)):  # an error in the stream, or the end of the connection
            list(stream)
        for one in waiting:
            assert isinstance(one.exception(), openai.APIStatusError | openai.APIConnectionError)
            assert getattr(one.exception(), "status_code", 503) == 503
    assert "Traceback" not in started.said
    address.check("127.0.0.1", int(started.url.removesuffix("/v1").rpartition(":")[2]))


def test_a_base_that_its_adapter_rewrites_is_not_served(adapters: dict[str, Path], tmp_path: Path) -> None:
    """PiSSA as peft saves it by itself: loading takes the start out of the base's weights."""
    import shutil

    from finetune.commands.serve import made
    from finetune.evaluation.writers import targets_of

    folder = tmp_path / "pissa"
    shutil.copytree(adapters["a"] / "adapter", folder)
    assert list(made(targets_of([str(folder)], None, {}), None)) == ["pissa", "tiny-llama"]
    described = folder / "adapter_config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "init_lora_weights": "pissa"}))
    assert list(made(targets_of([str(folder)], None, {}), None)) == ["pissa"]
