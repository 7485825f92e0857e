"""Chat templates: which one a tokenizer gets, how it is rendered, and what it can express."""

from __future__ import annotations

import functools
import json
import re
import traceback
from pathlib import Path
from typing import Any

from finetune.data import template_limits
from finetune.data.types import Message, RowProblem, is_plain
from finetune.errors import UserError
from finetune.resources import resource_path

MEND = "change the row's turns, or set model.chat_template"
STOPPED = "template_stopped"  # the kind of problem that it is to take too long
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Variables = dict[str, Any]


def shipped() -> dict[str, str]:
    """Name -> text of the templates in data_templates/chat_templates, all with {% generation %} marks."""
    folder = resource_path("data_templates", "chat_templates")
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> Any:
    """The template, ready to be rendered; jinja2's TemplateSyntaxError where it is none."""
    return template_limits.limited(environment(), template)


def environment() -> Any:
    # transformers' own environment (sandbox, filters): a private name, but the only way to be sure of rendering what
    # apply_chat_template renders. The template itself is not compiled there: what is constant would be computed.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment


EDGES = "\U0010fff0\U0010fff1"  # private use: what {% generation %} and {% endgeneration %} write


@functools.lru_cache(maxsize=32)
def compiled_with_marks(template: str, edges: str) -> Any:
    """Like `compiled`, but {% generation %} blocks come out between the two characters of `edges`. Twice as fast as
    transformers' own tracker, and right inside loops and macros, where that one counts from the wrong place."""
    import jinja2
    from jinja2.ext import Extension

    class Marks(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)
        priority = 1000  # after transformers' extension for the same tag, so that this one is used

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            first, last = (jinja2.nodes.Output([jinja2.nodes.TemplateData(c)]).set_lineno(line) for c in edges)
            return [first, *body, last]

    return template_limits.limited(environment().overlay(extensions=[Marks]), template)


def prepare(messages: list[Message]) -> list[Message]:
    """What apply_chat_template hands to the template: reasoning under all its names, our own keys left out."""
    if is_plain(messages):
        return messages
    out = []
    for message in messages:
        if len(message) > 2:
            message = {k: v for k, v in message.items() if k not in ("train", "metadata", "tools", "results")}
            if "reasoning_content" in message:
                message = {"thinking": message["reasoning_content"], **message}
        out.append(message)
    return out


def render(template: str, messages: list[Message], tools: Any, variables: Variables, prompt: bool = False) -> str:
    """The text as apply_chat_template gives it, with `prompt` followed by the header of the assistant's turn."""
    return rendered(compiled(template), messages, tools, variables, prompt)


@functools.lru_cache(maxsize=64)
def globals_of(template: Any) -> dict[str, Any]:
    return dict(template.globals)


def rendered(template: Any, messages: list[Message], tools: Any, variables: Variables, prompt: bool) -> str:
    import jinja2

    given = {"messages": prepare(messages), "tools": tools, "documents": None, "add_generation_prompt": prompt}
    try:
        # What template.render does, without looking through the environment's globals (a chain of mappings) for every
        # row, twice: more than half of the time.
        shared = globals_of(template)
        context = jinja2.runtime.new_context(
            template.environment, template.name, template.blocks, {**shared, **variables, **given}, True, shared
        )
        template_limits.SPENT.begin()
        pieces = []
        for piece in template.root_render_func(context):
            template_limits.SPENT.write(len(piece) if len(piece) <= template_limits.LONG else 0)  # the rest is counted
            pieces.append(piece)
        return "".join(pieces)
    except template_limits.TooMuch as error:
        raise RowProblem(STOPPED, f"the chat template is stopped: {error}", MEND) from None
    except Exception as error:  # a template is a program, and raises whatever Python does
        fix = MEND
        if type(error) is jinja2.exceptions.TemplateError:  # its own raise_exception
            raise RowProblem("template_refused", f"the chat template refuses this conversation: {error}", fix) from None
        what = f"the chat template fails in {failed_in(template, error)} ({type(error).__name__}: {error})"
        raise RowProblem("template_failed", what, fix) from None


def failed_in(template: Any, error: Exception) -> str:
    """The template's file, where `check` has told it, and the line that raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    line = f"line {template.get_corresponding_lineno(lines[-1]) if lines else 1}"
    return f"{template.name}, {line}" if template.name else line


def check(template: str, tokenizer: Any, origin: str) -> None:
    """UserError, with file and line, for a template that is none or that fails on the plainest conversations."""
    import jinja2

    file = template_file(tokenizer) if tokenizer.chat_template else origin
    fix = "mend it, or set model.chat_template"
    try:
        compiled(template).name = file
    except jinja2.exceptions.TemplateSyntaxError as error:
        what = f"the chat template is not valid: {error.message}"
        raise UserError(what, path=file, line=error.lineno, key="model.chat_template", fix=fix) from None
    problems = []
    for messages in ([U, A], [U], [turn("system", "s1"), U, A]):
        try:
            render(template, messages, None, dict(tokenizer.special_tokens_map))
            return
        except RowProblem as problem:
            problems.append(problem)
            if problem.kind == STOPPED:
                raise UserError(problem.message, path=file, key="model.chat_template", fix=fix) from None
    if all(problem.kind == "template_failed" for problem in problems):
        raise UserError(problems[0].message, key="model.chat_template", fix=fix)


def template_file(tokenizer: Any) -> str:
    """Where the tokenizer's template stands, as far as it is known."""
    given = getattr(tokenizer, "template_file", None)
    if given is not None:
        return str(given)
    folder = Path(str(tokenizer.name_or_path))
    known = (folder / "chat_template.jinja", folder / "tokenizer_config.json")
    return str(next((file for file in known if file.is_file()), folder))


def render_spans(
    template: str, messages: list[Message], tools: Any, variables: Variables, edges: str = EDGES
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character ranges that stand inside {% generation %}. No content may hold one of `edges`."""
    head, *blocks = rendered(compiled_with_marks(template, edges), messages, tools, variables, False).split(edges[0])
    pieces, spans, at = [head], [], len(head)
    for block in blocks:
        inside, _, after = block.partition(edges[1])
        spans.append((at, at + len(inside)))
        pieces += (inside, after)
        at += len(inside) + len(after)
    return "".join(pieces), spans


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "probe_call", "arguments": {"probe_key": "v"}}}
PARAMETERS = {"type": "object", "properties": {"probe_key": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "probe_tool", "description": "d", "parameters": PARAMETERS}}
U, A = turn("user", "u1"), turn("assistant", "a1")
U2, A2 = turn("user", "u2"), turn("assistant", "a2")
PROBES: list[tuple[list[Message], Any]] = [
    ([U, A], None),
    ([turn("system", "s1"), U, A], None),
    ([turn("user", " u1\n"), turn("assistant", "\na1 "), U2, A2], None),
    ([turn("system", " s1 "), U, A, U2, A2], None),
    ([U], None),
    ([turn("system", ""), U, A], None),
    ([U, turn("assistant", "<think>\nt\n</think>\n\na1"), U2, A2], None),
    ([U, turn("assistant", "a1", reasoning_content="t"), U2, A2], None),
    ([U, A], [TOOL]),
    ([turn("system", "s1"), U, turn("assistant", "", tool_calls=[CALL]), turn("tool", "r1"), A], [TOOL]),
    ([U, turn("assistant", "a1", tool_calls=[CALL, CALL]), turn("tool", "r1"), turn("tool", "r2"), A2], None),
]


def attempt(
    template: str, messages: list[Message], tools: Any, variables: Variables, prompt: bool = False
) -> str | None:
    """The rendering, or None where the template refuses."""
    try:
        return render(template, messages, tools, variables, prompt)
    except RowProblem:
        return None


CUT = "\U0010fff2 "  # private use: stands at the end of a turn that is gone on with


def asked(template: str, messages: list[Message], variables: Variables, goes_on: bool = False) -> str:
    """A prompt as transformers' apply_chat_template writes it (add_generation_prompt, or continue_final_message),
    within the limits of `template_limits`. RowProblem where the template refuses."""
    if not goes_on:
        return render(template, messages, None, variables, prompt=True)
    last = {**messages[-1], "content": str(messages[-1]["content"]) + CUT}
    text = render(template, [*messages[:-1], last], None, variables)
    if CUT.strip() not in text:
        what = "the chat template leaves out the turn that is to be gone on with"
        raise RowProblem("template_refused", what, MEND)
    before, _, behind = text.rpartition(CUT.strip())
    return before if behind.startswith(" ") else before.rstrip()


def annotated(template: str, variables: Variables) -> str | None:
    """The template with {% generation %} marks that renders every probe exactly as `template` does: itself, a shipped
    one, or None."""
    if GENERATION.search(template):
        return template
    cases = [(m, t, variables, prompt) for m, t in PROBES for prompt in (False, True)]
    wanted = [attempt(template, *case) for case in cases]
    for candidate in shipped().values():
        if all(attempt(candidate, *case) == text for case, text in zip(cases, wanted, strict=True)):
            return candidate
    return None


@functools.lru_cache(maxsize=32)
def expresses(template: str, variables: tuple[tuple[str, str], ...]) -> tuple[bool, bool, bool]:
    """Whether the template shows (tool descriptions, tool calls, tool results)."""
    known = dict(variables)
    tools = attempt(template, [turn("user", "u")], [TOOL], known) or ""
    called = [turn("user", "u"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "probe_result")]
    calls = attempt(template, called, None, known) or ""
    if "probe_call" not in calls:
        calls = attempt(template, arguments_as_text(called), None, known) or calls
    return "probe_tool" in tools, "probe_call" in calls, "probe_result" in calls


@functools.lru_cache(maxsize=32)
def wants_text(template: str, variables: tuple[tuple[str, str], ...]) -> bool:
    """Whether the template shows calls only with their arguments as JSON text (DeepSeek)."""
    called = [turn("user", "u"), turn("assistant", "", tool_calls=[CALL])]
    tried = (attempt(template, given, None, dict(variables)) for given in (called, arguments_as_text(called)))
    return ["probe_call" in (text or "") for text in tried] == [False, True]


def arguments_as_text(messages: list[Message]) -> list[Message]:
    """The arguments of all calls as JSON text, as some templates expect them."""

    def texted(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [{**m, "tool_calls": [texted(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


TOLD_BY = {
    "chatml.jinja": {"<|im_start|>", "<|im_end|>"},
    "llama3.jinja": {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
    "gemma.jinja": {"<start_of_turn>", "<end_of_turn>"},
    "phi3.jinja": {"<|user|>", "<|assistant|>", "<|end|>"},
    "baichuan2.jinja": {"<reserved_106>", "<reserved_107>"},
}
"""Template -> the control tokens that a tokenizer without a template must have for it."""


def choose(tokenizer: Any, family: Any = None) -> tuple[str, str]:
    """(template, where it comes from): the tokenizer's own, the family's, the one its control tokens tell, or plain."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()))
    if own:
        return own, "the tokenizer's own chat template"
    name = getattr(family, "template", None)
    if name is None:
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        name = next((file for file, tokens in TOLD_BY.items() if tokens <= added), "plain.jinja")
    text = resource_path("data_templates", "chat_templates", name).read_text(encoding="utf-8")
    return text, f"the shipped template {name} (the tokenizer has none)"


TOOLS_HEAD = "You may call these functions to answer. Their descriptions, one JSON object per line:\n<tools>\n"
TOOLS_TAIL = (
    "\n</tools>\nTo call one, write a JSON object with its name and arguments:\n"
    '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>'
)


def tools_as_text(
    messages: list[Message], tools: Any, shows_tools: bool, shows_calls: bool, shows_results: bool
) -> tuple[list[Message], Any]:
    """Tool descriptions, calls and results written into content (Hermes' form, which Qwen uses), each only where the
    template has no place for it and would leave it out without a word."""
    out: list[Message] = []
    for message in messages:
        if not shows_calls and "tool_calls" in message:
            texts = (json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"])
            calls = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
            message = {k: v for k, v in message.items() if k != "tool_calls"}
            message["content"] = f"{message['content']}\n{calls}" if message["content"] else calls
        if not shows_results and message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if out and out[-1]["role"] == "user" and out[-1].get("results"):
                out[-1]["content"] += f"\n{content}"
                continue
            message = {"role": "user", "content": content, "results": True}
        out.append(message)
    if tools and not shows_tools:
        listing = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        text = f"{TOOLS_HEAD}{listing}{TOOLS_TAIL}"
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
        else:
            out.insert(0, {"role": "system", "content": text})
        tools = None
    return out, tools or None  # `results` stays on user turns that hold tool output: it is never trained
