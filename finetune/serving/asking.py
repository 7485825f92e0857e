"""A request becomes rows to write, or is refused: everything that can be wrong with it, before it waits."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from finetune.data import checks, thinking
from finetune.data.messages import to_messages
from finetune.data.offsets import check_embedded
from finetune.data.shown import Losses
from finetune.data.types import Conversation, Message, RowProblem
from finetune.errors import UserError
from finetune.evaluation.answering import Writer
from finetune.evaluation.generation import stop_ids
from finetune.recipe.sections import GenerationConfig as Settings
from finetune.serving import grammar
from finetune.serving.bodies import ApiError, Body, ChatBody, CompletionBody
from finetune.serving.calls import CallFormat, detected
from finetune.serving.grammar import Grammar, NoGrammar
from finetune.serving.pieces import Continued, Decoder, Said, Sayer, UntilStop
from finetune.serving.rows import Event, Row


@dataclass
class Served:
    """A model under its name."""

    name: str
    writer: Writer
    how: Settings
    """What holds where a request says nothing."""
    longest_prompt: int | None = None
    longest_answer: int = 1024
    most_rows: int = 64
    """Answers to one request."""
    calls: CallFormat | None = None
    """How tools are called."""
    known: Any = None
    """The tokenizer as the grammar's library knows it, once somebody asked."""

    @classmethod
    def of(cls, name: str, writer: Writer, how: Settings, **bounds: Any) -> Served:
        return cls(name, writer, how, calls=detected(writer.prompter.encoder), **bounds)

    @property
    def vocabulary(self) -> int:
        assert self.writer.network is not None
        return int(self.writer.network.model.get_input_embeddings().weight.shape[0])


@dataclass
class Asked:
    """The rows of a request: n for each prompt."""

    rows: list[Row]
    prompt_tokens: int
    n: int


Put = Callable[[int], Callable[[Event], None]]
"""Number of a row -> where its pieces go."""


def chat(served: Served, body: ChatBody, put: Put) -> Asked:
    """ApiError for what cannot be asked."""
    encoder = served.writer.prompter.encoder
    tools = [{"type": "function", "function": described(tool)} for tool in body.tools or ()]
    calling = bool(tools) and body.tool_choice != "none"
    if calling and served.calls is None:
        what = f"the chat format of {served.name} has no calls of tools that are read here: leave tools out"
        raise ApiError(what, "tools", code="unsupported_parameter")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError("max_tokens and max_completion_tokens say different things: give one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
    on = switch(served, body.chat_template_kwargs or {})
    prompt = asked_ids(served, turns(body), tools if calling else [], on)
    begun = thinking.begun(encoder.tokenizer, prompt, encoder.thinking)
    schema = wanted_schema(body, calling, begun)
    special = served.calls.special if calling and served.calls is not None else frozenset()
    names = [tool.function.name for tool in body.tools or ()]
    decode = partial(_decoded, encoder, special)
    return rows_of(
        served, body, [prompt], body.max_completion_tokens or body.max_tokens, put,
        sayer=lambda: Said(encoder.thinking, begun, served.calls if calling else None, names),
        decoder=lambda prompt: Decoder(decode), top=(body.top_logprobs or 0) if body.logprobs else None, schema=schema,
    )  # fmt: skip


def _decoded(encoder: Any, special: frozenset[int], ids: list[int]) -> str:
    return thinking.decoded(encoder.tokenizer, ids, encoder.thinking, special)


def described(tool: Any) -> dict[str, Any]:
    return {k: v for k, v in tool.function.model_dump(exclude={"strict"}).items() if v is not None}


def switch(served: Served, given: dict[str, bool]) -> bool | None:
    """Whether to think; None: as the server was told, or as was trained."""
    name = served.writer.prompter.encoder.thinking.switch
    if other := next((key for key in given if key != name), None):
        has = f"only {name} is" if name else "there is no such switch"
        raise ApiError(f"chat_template_kwargs.{other}: {has} in the chat template", "chat_template_kwargs")
    return given.get(name) if name else None


def turns(body: ChatBody) -> list[Message]:
    """The conversation, as rows of data have it."""
    given = []
    for turn in body.messages:
        kept = turn.model_dump(exclude_none=True, exclude={"annotations"})
        kept.setdefault("content", "")
        for call in kept.get("tool_calls", ()):
            call.pop("index", None)
        given.append(kept)
    try:
        messages = to_messages(given, "messages")
    except RowProblem as problem:
        raise refused(problem) from None
    if messages[-1]["role"] not in ("user", "tool"):
        what = f"nothing is asked: the last turn is of the {messages[-1]['role']}, and must be of user or tool"
        raise ApiError(what, "messages")
    return messages


def asked_ids(served: Served, messages: list[Message], tools: list[dict[str, Any]], on: bool | None) -> list[int]:
    prompter, asked = served.writer.prompter, Conversation(messages, tools or None)
    findings = {f.kind: f for f in checks.check(asked, asked.whole_text) if f.level == "error"}
    if "broken_encoding" in findings:
        raise ApiError(findings["broken_encoding"].message, "messages")
    encoder = prompter.encoder
    # Turns in an order that is never trained are the template's to take or refuse, but not to leave out.
    if "wrong_order" in findings or any("name" in message for message in messages):
        fresh = Losses(encoder.losses.show, encoder.losses.tags)  # what strangers ask is not remembered
        for turn, what in fresh.of(messages, tools or None):
            if what in ("name", "content"):
                left = f"the chat template of {served.name} leaves out the {what} of turn {turn + 1}"
                raise ApiError(left, f"messages[{turn}]")
    try:
        if on is not None:
            encoder = thinking.asked(encoder, on, "chat_template_kwargs")
        return type(prompter)(encoder, None, False, None, prompter.allow_forged).of_turns(asked)
    except UserError as problem:
        raise refused(problem) from None


def refused(problem: UserError, param: str = "messages") -> ApiError:
    first = problem.problems[0]
    return ApiError(first.message + (f" ({first.fix})" if first.fix else ""), param)


def wanted_schema(body: ChatBody, calling: bool, begun: bool) -> dict[str, Any] | None:
    """The JSON schema that the answer has to follow."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    name = "response_format"
    if not grammar.installed():
        what = f"needs {grammar.MODULE} on the server: pip install 'ft-recipes[serve]'"
        raise ApiError(f"{name}: {what}", name, code="unsupported_parameter")
    if calling or begun:
        why = "together with tools" if calling else "of an answer that begins inside its thinking"
        raise ApiError(f"{name}: not followed {why}", name, code="unsupported_parameter")
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise ApiError(f"{name}.json_schema is missing", f"{name}.json_schema")
    return wanted.json_schema.schema_


def completion(served: Served, body: CompletionBody, put: Put) -> Asked:
    """ApiError for what cannot be asked."""
    prompter = served.writer.prompter
    tokenizer = prompter.encoder.tokenizer
    given: Any = body.prompt
    listed = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    prompts = []
    for prompt in listed:
        try:
            if isinstance(prompt, str):
                prompts.append(prompter.of_text(prompt.encode("utf-8").decode()))
            else:
                check_embedded(tokenizer, prompt)
                if max(prompt) >= served.vocabulary:
                    raise ApiError(f"prompt: no token has the id {max(prompt)}", "prompt")
                prompts.append(prompt)
        except UnicodeEncodeError:
            raise ApiError("prompt: half a surrogate pair", "prompt") from None
        except UserError as problem:
            raise refused(problem, "prompt") from None

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    return rows_of(
        served, body, prompts, body.max_tokens, put, sayer=Continued,
        decoder=lambda prompt: Decoder(decode, prompt[-16:]), top=body.logprobs,
    )  # fmt: skip


def rows_of(
    served: Served, body: Body, prompts: Sequence[list[int]], wanted: int | None, put: Put, sayer: Callable[[], Sayer],
    decoder: Callable[[list[int]], Decoder], top: int | None, schema: dict[str, Any] | None = None,
) -> Asked:  # fmt: skip
    n = body.n or 1
    if n * len(prompts) > served.most_rows:
        what = f"{n * len(prompts)} answers in one request, and this server takes {served.most_rows}"
        raise ApiError(what, "n")
    how, bias = settings(served.how, body), biases(served, body.logit_bias or {})
    rooms = [room(served, len(prompt), wanted) for prompt in prompts]
    rows: list[Row] = []
    for p, prompt in enumerate(prompts):
        for k in range(n):
            rows.append(
                Row(
                    prompt, rooms[p], how, f"{p}.{k}" if k else p, decoder(prompt), UntilStop(body.stops), sayer(),
                    put(len(rows)), bool(body.stream), top, body.presence_penalty or 0.0, body.frequency_penalty or 0.0,
                    bias, None if schema is None else constraint(served, schema),
                )
            )  # fmt: skip
    return Asked(rows, sum(map(len, prompts)), n)


def settings(usual: Settings, body: Body) -> Settings:
    """How the answer is drawn: what the request says, then what the model's run does. Without a seed by chance."""
    told = {
        key: float(value) if key != "top_k" else value
        for key in ("temperature", "top_p", "top_k", "repetition_penalty")
        if (value := getattr(body, key)) is not None
    }
    seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed % (1 << 63)
    return usual.model_copy(update={**told, "seed": seed, "num_beams": 1})


def biases(served: Served, given: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < served.vocabulary):
            raise ApiError(f"logit_bias: {key[:20]!r} is no token id", "logit_bias")
        found[int(key)] = float(bias)
    return found


def room(served: Served, length: int, wanted: int | None) -> int:
    """Tokens that may be written behind a prompt of this length."""
    if wanted is not None and wanted > served.longest_answer:
        what = f"max_tokens: {wanted} is more than this server writes ({served.longest_answer})"
        raise ApiError(what, "max_tokens")
    context, most = served.writer.prompter.longest, served.longest_prompt
    if most is not None and length > most:
        what = f"the prompt has {length} tokens, and this server takes {most}"
        raise ApiError(what, code="context_length_exceeded")
    left = served.longest_answer if context is None else context - length
    if left < (wanted or 1):
        what = f"the model was made for {context} tokens; the prompt has {length}, and {wanted or 1} are to be written"
        raise ApiError(what, code="context_length_exceeded")
    return wanted or min(left, served.longest_answer)


def constraint(served: Served, schema: dict[str, Any]) -> Grammar:
    assert served.writer.network is not None
    encoder = served.writer.prompter.encoder
    try:
        if served.known is None:
            ends = stop_ids(served.writer.network.model, encoder)
            served.known = grammar.vocabulary(encoder.tokenizer, served.vocabulary, ends)
        return Grammar(served.known, schema)
    except NoGrammar as why:
        raise ApiError(f"response_format: {why}", "response_format") from None
