"""Where the trained turns stand in a rendered conversation.

From {% generation %} marks (of the template itself, or of a shipped copy that renders the same), otherwise from the
difference between the conversation with and without the turn. Where the template writes earlier turns otherwise once
more follow, or a reply otherwise than its prompt begins: from what stands between the contents around it.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from finetune.data import control_tokens, shown, templates
from finetune.data.types import Message, RowProblem


def from_tool(message: Message) -> bool:
    return message["role"] == "tool" or "results" in message


class Spans:
    def __init__(
        self, template: str, annotated: str | None, variables: dict[str, Any], end_tokens: tuple[str, ...],
        eos: str | None, added: re.Pattern[str],
    ) -> None:  # fmt: skip
        """annotated: the template with marks, None without; end_tokens: the strings that end the assistant's turn;
        added: the tokens that the tokenizer keeps whole."""
        self.template, self.annotated, self.variables = template, annotated, variables
        self.end_tokens, self.eos = end_tokens, eos
        self.units = re.compile(f"{added.pattern}|{shown.TAG.pattern}")
        self.tags = shown.tags_of(template)
        self._verified: set[tuple[str, ...]] = set()
        self._otherwise: dict[Any, frozenset[int]] = {}

    def of(
        self, messages: list[Message], tools: Any, content: str, weights: dict[int, float]
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """(text, message index -> character range) of the turns in `weights`."""
        if self.annotated is not None:
            assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            edges = templates.EDGES
            if edges[0] in content or edges[1] in content:
                edges = control_tokens.unused(content, 4)[2:]  # the first may be the mark
            text, blocks = templates.render_spans(self.annotated, messages, tools, self.variables, edges)
            if len(blocks) == len(assistants) and self._same(text, messages, tools):
                spans = dict(zip(assistants, blocks, strict=True))
                return text, {i: self._trim(text, *spans[i]) for i in weights}
        text = templates.render(self.template, messages, tools, self.variables)
        return text, {i: self._found(text, messages, tools, content, i) for i in weights}

    def prompted_otherwise(self, text: str, messages: list[Message], tools: Any) -> frozenset[int]:
        """The assistant turns up to which `text` is not what the prompt for them is: asked once per shape."""
        key = shown.shape(messages, tools, self.tags)
        if key not in self._otherwise:
            if len(self._otherwise) >= shown.KEPT:
                self._otherwise.clear()
            turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
            prompts = {i: templates.attempt(self.template, messages[:i], tools, self.variables, True) for i in turns}
            self._otherwise[key] = frozenset(i for i, prompt in prompts.items() if not text.startswith(prompt or ""))
        return self._otherwise[key]

    def tool_output(self, text: str, messages: list[Message], tools: Any, content: str) -> list[tuple[int, int]]:
        """Character ranges of what tools returned, found by rendering it between two characters that occur nowhere."""
        fence = control_tokens.unused(content, 6)  # the first four may be the mark and the edges
        first, last = fence[4], fence[5]
        fenced = [{**m, "content": f"{first}{m['content']}{last}"} if from_tool(m) else m for m in messages]
        head, *parts = templates.render(self.template, fenced, tools, self.variables).split(first)
        whole, ranges = head, []
        for part in parts:
            inside, _, after = part.partition(last)
            ranges.append((len(whole), len(whole) + len(inside)))
            whole += inside + after
        if whole != text:
            what = "the chat template changes tool output, which therefore cannot be kept out of the loss"
            raise RowProblem("unstable_template", what, "set data.train_on: assistant")
        return ranges

    def _same(self, text: str, messages: list[Message], tools: Any) -> bool:
        """Whether the marked copy rendered what the template itself renders: looked at once per shape of conversation,
        and always where contents could take another path (blank, edged with white space, thinking, tools)."""
        if self.annotated is self.template:
            return True
        plain = not tools and all(
            len(m) == 2 and m["content"] == m["content"].strip() and m["content"] and "think>" not in m["content"]
            for m in messages
        )
        shape = tuple(m["role"] for m in messages) if plain and len(messages) < 32 else None
        if shape is not None and shape in self._verified:
            return True
        same = templates.render(self.template, messages, tools, self.variables) == text
        if same and shape is not None:
            self._verified.add(shape)
        return same

    def _found(self, text: str, messages: list[Message], tools: Any, content: str, i: int) -> tuple[int, int]:
        """Character range of turn i in the rendering of an unmarked template."""
        try:
            return self._difference(text, messages, tools, i)
        except RowProblem as problem:
            between = self._between(text, messages, tools, content, i) if problem.kind == "unstable_template" else None
            if between is None:
                raise
            return between

    def _between(self, text: str, messages: list[Message], tools: Any, content: str, i: int) -> tuple[int, int] | None:
        """Character range of turn i: what stands between the contents before and after it, found by a character that
        occurs nowhere at their edges, without what it shares with its prompt. None where that is not certain."""
        fences = control_tokens.unused(content, 9)[6:]  # the others may be mark, edges and fence
        before, after, own = list(fences)
        last = i == len(messages) - 1

        def fenced(j: int, message: Message) -> Message:
            inner = message["content"].strip()
            if not inner or (j != i and message["role"] == "assistant"):
                return message
            new = after + inner if j > i else inner + (own if j == i else before)
            return {**message, "content": message["content"].replace(inner, new, 1)}

        def bare(part: str) -> str:
            return part.translate(dict.fromkeys(map(ord, fences)))

        if not last and messages[i + 1]["role"] == "assistant":
            return None
        marked = [fenced(j, message) for j, message in enumerate(messages)]
        whole = templates.attempt(self.template, marked, tools, self.variables)
        prompt = templates.attempt(self.template, marked[:i], tools, self.variables, prompt=True) if i else ""
        if whole is None or prompt is None or bare(whole) != text:
            return None
        at = whole.rfind(before) + 1
        window, follows, _ = whole[at:].partition(after)
        header = self._shared(prompt[prompt.rfind(before) + 1 :], bare(window))
        if header is None or (not last and not follows) or (own in whole and own not in window):
            return None
        said, first = window.find(own), len(bare(whole[:at]))  # all the turn says stands before `said`
        window = bare(window)
        if last:
            return self._trim(text, first + header, len(text))
        ends = [window.rfind(token, header) + len(token) for token in self.end_tokens if token in window[header:]]
        end = max(ends, default=said)
        return (first + header, first + end) if header <= end and said <= end else None

    def _shared(self, prompt: str, window: str) -> int | None:
        """How many characters of the header a prompt and a record of the reply share. None where they differ in more
        than what opens or closes thinking: another header."""
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, window, strict=False))
        count = sum(1 for _ in pairs)
        for part in (prompt, window):  # a token is shared whole or not at all
            inside = (hit.start() for hit in self.units.finditer(part) if hit.start() < count < hit.end())
            count = next(inside, count)
        rest = prompt[count:].lstrip()
        return None if (prompt and not count) or (rest and not self.units.match(rest)) else count

    def _difference(self, text: str, messages: list[Message], tools: Any, i: int) -> tuple[int, int]:
        """Character range of turn i: what it adds to the conversation before it, header excluded."""
        before = templates.render(self.template, messages[:i], tools, self.variables, prompt=True) if i else ""
        upto = text
        if i < len(messages) - 1:
            upto = templates.render(self.template, messages[: i + 1], tools, self.variables)
            if not text.startswith(upto):  # some templates close every text with the end token
                upto = upto.removesuffix(self.eos) if self.eos else upto
        marked = "model.chat_template to a template with {% generation %} marks"
        if not text.startswith(upto):
            what = f"the chat template writes turn {i + 1} differently once more turns follow: no safe label mask"
            raise RowProblem("unstable_template", what, f"set data.train_on: last, or {marked}")
        if not upto.startswith(before):
            what = f"turn {i + 1}: the chat template's prompt is not how its record of the reply begins"
            raise RowProblem("unstable_template", what, f"set {marked}")
        return self._trim(text, len(before), len(upto))

    def _trim(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The range up to the token that ends the turn. White space behind it, and an end token of the whole text, are
        the template's; an end token just behind the range belongs to it."""
        stripped = text[start:end].rstrip()
        if stripped.endswith(self.end_tokens):
            while True:
                last = next(token for token in self.end_tokens if stripped.endswith(token))
                shorter = stripped.removesuffix(last).rstrip()
                if not shorter.endswith(self.end_tokens):
                    return start, start + len(stripped)
                stripped = shorter
        for token in self.end_tokens:
            if text.startswith(token, end):
                return start, end + len(token)
        return start, end
