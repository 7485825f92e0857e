"""What may stand in a request, as OpenAI's API has it. A parameter that is not followed has no place here, and is
refused by name; those that OpenAI documents as without influence on answers are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import visible

MOST_STOPS, MOST_TOP = 4, 20
LONGEST = 500  # characters of a message, which may name what was asked


class ApiError(Exception):
    """What a client is told, in OpenAI's shape."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
        kind: str = "invalid_request_error", headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.kind = message, param, status, code, kind
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        param = None if self.param is None else visible(self.param[:LONGEST])
        return {
            "error": {"message": visible(self.message[:LONGEST]), "type": self.kind, "param": param, "code": self.code}
        }


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Function(Strict):
    name: str
    arguments: str
    """JSON text."""


class CallBody(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None
    """Streamed calls have one."""


class Turn(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    """Empty: as the client makes them of an answer."""


class ToolFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: ToolFunction


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: padding against listeners, without influence on answers."""


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    """For people; answers follow the schema."""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """The schema is always followed."""


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]


class Body(Strict):
    """What chats and completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Unset: as the run's eval.generation says, or 0."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Not OpenAI's; as in vLLM."""
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Not OpenAI's; as in vLLM."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Bias] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Taken, without influence on answers.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in-memory", "24h"] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatBody(Body):
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    chat_template_kwargs: dict[str, bool] | None = None
    """Not OpenAI's; as in vLLM, for the template's switch of thinking: {"enable_thinking": false}."""


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionBody(Body):
    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


SHAPES = {
    "content": "text, or a list of {type: text, text: …}",
    "prompt": "a text, token ids, or a list of either",
    "stop": f"a text, or a list of up to {MOST_STOPS}; none of them empty",
    "tool_choice": "auto or none: a call cannot be forced",
}
"""Where what is wrong has many reasons at once."""


def parsed(kind: type[Body], value: Any) -> Any:
    """The body; null is as good as left out. ApiError that names the first thing that is wrong."""
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    try:
        return kind.model_validate(without_nulls(value))
    except ValidationError as error:
        raise _told(error) from None


def without_nulls(value: Any) -> Any:
    """Without the null keys of a body and of its turns; those in schemas, metadata and the like stay."""
    found = {key: item for key, item in value.items() if item is not None}
    if isinstance(turns := found.get("messages"), list):
        found["messages"] = [
            {key: item for key, item in turn.items() if item is not None or key == "content"}
            if isinstance(turn, dict)
            else turn
            for turn in turns
        ]
    return found


def _told(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    *before, last = first["loc"] or ("",)
    foreign = first["type"] == "extra_forbidden"  # the client's own word, whatever it is
    place = [part for part in before if not _is_branch(part)]
    place += [last] if foreign or not _is_branch(last) else []
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    name = next((part for part in reversed(place) if isinstance(part, str)), "")
    top = str(place[0]) if place else ""
    if foreign:
        what = f"{param} is not followed by this server: leave it out"
        return ApiError(what, param, code="unsupported_parameter")
    shape = next((SHAPES[key] for key in (name, top) if key in SHAPES), None)
    if first["type"] == "missing":
        return ApiError(f"{param} is missing", param, code="missing_required_parameter")
    if shape is not None:
        return ApiError(f"{param} must be {shape}", param, code="invalid_value")
    if first["type"] == "literal_error":
        return ApiError(f"{param}: no other value is followed here ({first['msg']})", param, code="unsupported_value")
    return ApiError(f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}", param, code="invalid_value")


def _is_branch(part: str | int) -> bool:
    """pydantic's names for the branches of a union: `list[constrained-str]`, `str`, `constrained-str`, `TextPart`."""
    return isinstance(part, str) and not (part.islower() and part.replace("_", "").isalpha() and part not in BRANCHES)


BRANCHES = ("str", "int", "float", "bool")
