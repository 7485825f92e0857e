"""Conversations become ids and labels.

The tokenizer's own template is the reference: the ids are those of tokenizer.apply_chat_template. What is trained is
what the model has to write: everything after the header of an assistant turn, the token that ends it included; see
spans.py for where that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from finetune.data import chat_glm, control_tokens, shown, templates, thinking
from finetune.data.control_tokens import Guard
from finetune.data.encoder import Encoder
from finetune.data.glm_encoder import GlmEncoder
from finetune.data.offsets import ByLength, Tokens, check_embedded, first_from
from finetune.data.spans import Spans, from_tool
from finetune.data.types import IGNORED, Conversation, Encoded, Message, RowProblem, attempted, is_plain


@dataclass(slots=True)
class Plan:
    """A rendered conversation before it meets the tokenizer."""

    text: str
    spans: list[tuple[int, int, float]]
    """(start, end, weight) in characters of text."""
    mark: str | None
    """The character that marks written-out control tokens in text."""
    everything: bool
    closing: tuple[str, float] | None
    """What ends the last reply and its weight, where the template writes no end of turn after it."""
    lost: tuple[tuple[str, bool], ...]
    unprompted: tuple[int, ...]
    thinks: bool = False
    passed: tuple[int, ...] = ()


def make_encoder(tokenizer: Any, family: Any = None, treatment: str = "keep") -> Encoder:
    """The encoder for this tokenizer; `family`, a row of families.py, may name a template for bases without one.
    treatment: data.thinking, which is refused where the chat format cannot do it."""
    if chat_glm.glm_version(tokenizer) is not None:
        return GlmEncoder(tokenizer, treatment)
    return TemplateEncoder(tokenizer, family, treatment)


def turn_weights(messages: list[Message], train_on: str) -> dict[int, float]:
    """Index of every assistant message that carries loss -> its weight; with `all` also of those that carry none."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    weights = {}
    for i in turns[-1:] if train_on == "last" else turns:
        weight = float(messages[i].get("train", 1.0))
        if weight > 0 or train_on == "all":
            weights[i] = weight
    return weights


class TemplateEncoder:
    separator: int | None = None
    asks: bool | None = None  # whether prompts ask for thinking; None: as the template does by itself

    def __init__(self, tokenizer: Any, family: Any = None, treatment: str = "keep") -> None:
        self.tokenizer, self.treatment = tokenizer, treatment
        self.template, self.origin = templates.choose(tokenizer, family)
        templates.check(self.template, tokenizer, self.origin)
        self.notice = None if tokenizer.chat_template else f"chat format: {self.origin}"
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.guard = Guard(tokenizer)
        known = tuple(sorted((k, v) for k, v in self.variables.items() if isinstance(v, str)))
        self.shows_tools, self.shows_calls, self.shows_results = templates.expresses(self.template, known)
        self.text_arguments = templates.wants_text(self.template, known)
        self.thinking = thinking.detected(self.template, known)
        thinking.check_treatment(treatment, self.thinking, self.origin)
        # How rows without thinking are written. What opens the block with the prompt has to be told that there is none.
        prompt = templates.attempt(self.template, [templates.U], None, self.variables, prompt=True) or ""
        opens = prompt.rstrip().endswith(self.thinking.begin)
        told = self.thinking.switch is not None and (opens or treatment != "keep")
        self.plain: bool | None = False if told else None
        self.told = {on: {**self.variables, **self.thinking.variables(on)} for on in (None, True, False)}
        self.end_tokens, self.call_end = self._ends()
        ids = [tokenizer.convert_tokens_to_ids(token) for token in self.end_tokens]
        self.stop_ids: list[int] = [i for i in ids if i is not None]
        annotated, added = templates.annotated(self.template, self.variables), self.guard.all_added
        self.written = {
            on: Spans(self.template, annotated, variables, self.end_tokens, tokenizer.eos_token, added)
            for on, variables in self.told.items()
        }
        self.spans = self.written[None]
        self.end_id = self.stop_ids[0] if self.stop_ids else None
        self.markers = self._markers()
        tags = shown.tags_of(self.template)
        self.lost = {on: shown.Losses(partial(self._shown, on=on), tags) for on in self.told}
        self.losses = self.lost[None]
        self._fast = getattr(tokenizer, "backend_tokenizer", None) is not None
        plainest = templates.attempt(self.template, [templates.U, templates.A], None, self.variables)
        check_embedded(tokenizer, [*self.stop_ids, *self._tokenize([plainest or ""])[0].ids])  # once, not for every row

    # --- what callers use ---

    def encode(self, conversation: Conversation, train_on: str = "assistant") -> Encoded:
        """Ids and labels of one conversation. RowProblem when it cannot be encoded."""
        plans = self.plan_batch([conversation], train_on)
        result = self.label_batch(plans, self.tokenize_batch(plans))[0]
        if isinstance(result, RowProblem):
            raise result
        return result

    def plan_batch(self, conversations: Sequence[Conversation], train_on: str) -> list[Plan | RowProblem]:
        return [attempted(self.plan, conversation, train_on) for conversation in conversations]

    def tokenize_batch(self, plans: Sequence[Plan | RowProblem]) -> list[Tokens | RowProblem]:
        stock = iter(self._tokenize([p.text for p in plans if isinstance(p, Plan) and p.mark is None]))
        return [
            plan if isinstance(plan, RowProblem)
            else next(stock) if plan.mark is None
            else attempted(self.guard.tokens, plan.text, plan.mark)
            for plan in plans
        ]  # fmt: skip

    def label_batch(
        self, plans: Sequence[Plan | RowProblem], tokens: Sequence[Tokens | RowProblem]
    ) -> list[Encoded | RowProblem]:
        return [
            found if isinstance(found, RowProblem) else attempted(self._label, plan, found)
            for plan, found in zip(plans, tokens, strict=True)
        ]

    def prompt_ids(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, on: bool | None = None
    ) -> list[int]:
        """Ids of the conversation so far and the header of the assistant's turn, for generation. `on`: with thinking or
        without; by default what the encoder `asks` for."""
        if self.treatment == "drop":
            messages = thinking.dropped(messages, self.thinking)
        messages = thinking.moved(messages, self.thinking)
        messages, tools, _, mark = self._guarded(*self._expressible(messages, tools))
        text = templates.render(self.template, messages, tools, self.told[self.asks if on is None else on], prompt=True)
        ids = self._tokenize([text])[0].ids if mark is None else self.guard.tokens(text, mark).ids
        check_embedded(self.tokenizer, ids)
        return ids

    def forged_markers(self, messages: list[Message]) -> list[tuple[int, str]]:
        """(turn from 1, marker) for every turn marker in content that only looks like text to this tokenizer."""
        if self.markers is None:
            return []
        texts = [
            m["content"] if len(m) == 2 else control_tokens.all_strings([v for k, v in m.items() if k != "role"])
            for m in messages
        ]
        return [(number, hit) for number, text in enumerate(texts, 1) for hit in self.markers.findall(text)]

    def identity(self) -> tuple[str, ...]:
        """Everything the ids depend on, for the cache."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        day = str(date.today()) if "strftime_now" in self.template else ""
        return (vocabulary, self.template, str(self.spans.annotated), repr(self.variables), self.treatment, day)

    def mode(self, conversation: Conversation, train_on: str = "assistant") -> tuple[bool, bool | None]:
        """(whether a trained turn, or the answer beside it in a pair, has thinking; `on`: how it is written)."""
        trained = [i for i, weight in turn_weights(conversation.messages, train_on).items() if weight]
        thinks = thinking.present(conversation.messages, trained, self.thinking)
        rival = [m for m in conversation.rival or () if m["role"] == "assistant"]
        thinks = thinks or thinking.present(rival, range(len(rival)), self.thinking)
        if self.thinking.switch is None:
            return thinks, None
        if thinks and self.treatment != "drop":
            return True, True
        return thinks, self.asks if self.plain is None else self.plain

    def plan(self, conversation: Conversation, train_on: str = "assistant") -> Plan:
        """The text and what is trained in it."""
        turns, (thinks, on) = conversation.messages, self.mode(conversation, train_on)
        trained = {i for i, w in turn_weights(turns, train_on).items() if w}
        if self.treatment == "drop" or (self.treatment == "empty" and not thinks):
            turns = thinking.dropped(turns, self.thinking, trained)
        turns = thinking.moved(turns, self.thinking)
        lost = self.lost[on].of(turns, conversation.tools)
        messages, tools = self._expressible(turns, conversation.tools)
        weights = turn_weights(messages, train_on)
        messages, tools, content, mark = self._guarded(messages, tools)
        heads = {} if on is None else self._heads(messages, tools, weights, on)
        passed: list[int] = []
        if on is False and self.treatment == "empty":
            text = templates.render(self.template, messages, tools, self.told[on])
            passed = [i for i, head in heads.items() if weights[i] and (head is None or not text.startswith(head))]
            weights = {i: weight for i, weight in weights.items() if i not in passed}
        text, spans = self.written[on].of(messages, tools, content, weights)
        shown_heads = [(i, head) for i, head in heads.items() if i in spans and head and text.startswith(head)]
        for i, head in shown_heads:  # what a prompt shows is no reply
            spans[i] = max(spans[i][0], len(head)), spans[i][1]
        last = len(messages) - 1
        closing = None
        if self.end_tokens and last in spans and not text[: spans[last][1]].endswith(self.end_tokens):
            closing = self.call_end if "tool_calls" in messages[last] else self.end_tokens[0], weights[last]
        ranges = [(*spans[i], weights[i]) for i in sorted(spans)]
        if train_on == "all" and any(from_tool(m) for m in messages):
            ranges += [(start, end, 0.0) for start, end in self.written[on].tool_output(text, messages, tools, content)]
        if train_on == "all":
            ranges += [(*self._block(head), 0.0) for _, head in shown_heads]
        without = () if train_on == "all" else tuple(i + 1 for i in passed)
        otherwise = self.written[on].prompted_otherwise(text, messages, tools)
        # Contents that hold tools may have made turns of their own: the row's turns are told.
        given, told = ([i for i, m in enumerate(c) if m["role"] == "assistant"] for c in (messages, turns))
        unprompted = tuple([b for a, b in zip(given, told, strict=True) if a in otherwise and weights.get(a)])
        found = shown.told(lost, trained)
        return Plan(text, ranges, mark, train_on == "all", closing, found, unprompted, thinks, without)

    # --- steps ---

    def _shown(self, messages: list[Message], tools: Any, on: bool | None) -> str | None:
        return templates.attempt(self.template, *self._expressible(messages, tools), self.told[on])

    def _heads(self, messages: list[Message], tools: Any, turns: Iterable[int], on: bool) -> dict[int, str | None]:
        """Turn -> the prompt that it answers, None where the template refuses."""
        return {
            i: templates.attempt(self.template, messages[:i], tools, self.told[on], prompt=True) if i else ""
            for i in turns
        }

    def _block(self, head: str) -> tuple[int, int]:
        """Where the block of thinking stands with which a prompt ends."""
        place = head.rfind(self.thinking.begin)
        place = head.rfind(self.thinking.end) if place < 0 else place
        closed = head.rstrip().endswith((self.thinking.begin, self.thinking.end))
        return (place, len(head)) if closed and place >= 0 else (len(head), len(head))

    def _expressible(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any]:
        """Tools as text where the template would leave them out silently."""
        if not tools and not any("tool_calls" in m or m["role"] == "tool" for m in messages):
            return messages, None
        if self.text_arguments:
            messages = templates.arguments_as_text(messages)
        return templates.tools_as_text(messages, tools, self.shows_tools, self.shows_calls, self.shows_results)

    def _guarded(self, messages: list[Message], tools: Any) -> tuple[list[Message], Any, str, str | None]:
        """(messages and tools with written-out control tokens marked, all their text, the mark or None)."""
        if not tools and is_plain(messages):
            content = "\n".join([m["content"] for m in messages])
        else:
            content = control_tokens.all_strings([messages, tools])
        if not self.guard.suspicious(content):
            return messages, tools, content, None
        found = self.guard.found
        turns = [{k: v for k, v in m.items() if k != "role"} for m in messages]
        if not any(found(t, m["role"]) for t, m in zip(turns, messages, strict=True)) and not found(tools):
            return messages, tools, content, None
        mark = control_tokens.unused(content, 1)
        guarded = [
            {"role": m["role"], **self.guard.mark(t, mark, m["role"])} for t, m in zip(turns, messages, strict=True)
        ]
        return guarded, self.guard.mark(tools, mark), content, mark

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        """The tokens of each text, nothing added."""
        if not texts:
            return []
        if not self._fast:
            return [ByLength(self.tokenizer, text) for text in texts]
        backend = control_tokens.backend_of(self.tokenizer)
        return backend.encode_batch(texts, add_special_tokens=False)

    def _label(self, plan: Plan, tokens: Tokens) -> Encoded:
        """Labels from character ranges: a token belongs to the turn in which it begins."""
        ids = tokens.ids
        labels = list(ids) if plan.everything else [IGNORED] * len(ids)
        weighted = any(weight not in (0.0, 1.0) for *_, weight in plan.spans)
        weights = [1.0 if plan.everything else 0.0] * len(ids) if weighted else None
        for start, end, weight in plan.spans:
            a, b = first_from(tokens, start), first_from(tokens, end)
            labels[a:b] = ids[a:b] if weight else [IGNORED] * (b - a)
            if weights is not None:
                weights[a:b] = [weight] * (b - a)
        if plan.closing is not None:
            # Without an end the model would never learn to stop.
            token, weight = plan.closing
            end = self.tokenizer.convert_tokens_to_ids(token)
            ids, labels = [*ids, end], [*labels, end if weight else IGNORED]
            if weights is not None:
                weights.append(weight)
        check_embedded(self.tokenizer, ids)
        return Encoded(ids, labels, weights, plan.lost, plan.unprompted, plan.thinks, plan.passed)

    def _markers(self) -> re.Pattern[str] | None:
        """The turn markers that the template writes as plain text."""
        texts = (templates.attempt(self.template, m, t, self.variables) or "" for m, t in templates.PROBES)
        found = {hit for text in texts for hit in MARKER.findall(self.guard.all_added.sub(" ", text))}
        return control_tokens.pattern(found) if found else None

    def _ends(self) -> tuple[tuple[str, ...], str]:
        """(the strings that end an assistant turn, that of a plain reply first; the one that ends a call)."""

        def rendered(*messages: Message) -> str:
            return self._shown(list(messages), None, None) or ""

        def run(text: str) -> list[str]:
            """The first control tokens in `text` with nothing between them, up to one that begins a text."""
            found: list[str] = []
            hit = self.guard.control.search(text)
            while hit and hit[0] not in begins:
                found.append(hit[0])
                hit = self.guard.control.match(text, hit.end())
            return found

        begins = {self.tokenizer.bos_token} - {self.tokenizer.eos_token}
        asked, reply = templates.turn("user", "u"), templates.turn("assistant", "probe-reply")
        closing = run(rendered(asked, reply).partition("probe-reply")[2])
        further = rendered(asked, reply, templates.turn("user", "probe-next"))
        following = run(further.partition("probe-reply")[2].partition("probe-next")[0])
        # An end of several tokens is written after every turn; what only follows the last one ends the text. Where
        # nothing ends a turn, the next one's beginning does (GLM).
        both = [a for a, b in zip(closing, following, strict=False) if a == b]
        ends = both[-1:] or closing[:1] or following[:1]
        call_ends = ends
        if self.shows_calls:
            call = templates.turn("assistant", "", tool_calls=[templates.CALL])
            called = rendered(asked, call)
            tail = called.rpartition("probe_key")[2].rstrip()
            written = [hit[0] for hit in self.guard.control.finditer(tail) if hit.end() == len(tail)]
            answered = rendered(asked, call, templates.turn("tool", "probe-next"))
            if not any(end in tail for end in ends):
                call_ends = written or run(answered.removeprefix(called).partition("probe-next")[0])[:1] or ends
        eos = [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        return tuple(dict.fromkeys([*ends, *call_ends, *eos])), (call_ends or eos or [""])[0]


MARKER = re.compile(r"\[/?[A-Z_]{3,}\]|<</?SYS>>|\[\|\w+\|\]:?|<\|\w+\|>|</?(?:start|end)_of_turn>|<reserved_\d+>")
