"""Chat templates in Go's syntax: against Jinja at once, and against what Go itself has rendered of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.models.gguf.modelfile import modelfile
from finetune.models.gguf.turns import PLAIN, Turns, joined, learned, literal

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import ollama_goldens as tool  # noqa: E402

GOLDENS = json.loads(tool.GOLDENS.read_text(encoding="utf-8"))
AGAIN = "python tools/ollama_goldens.py writes the goldens again, with Go"
IMPOSSIBLE: set[str] = set()
"""Templates that no table of turns can be."""


def turns_of(name: str) -> Turns:
    found = learned(tool.renderer(tool.chat_templates()[name]))
    assert found is not None
    return found


def test_every_template_is_there() -> None:
    assert GOLDENS.keys() == tool.chat_templates().keys() - IMPOSSIBLE, AGAIN
    for name in IMPOSSIBLE:
        assert learned(tool.renderer(tool.chat_templates()[name])) is None


@pytest.mark.parametrize("name", GOLDENS)
def test_go_renders_what_jinja_renders(name: str) -> None:
    """Shapes that are not named as missing; of the others Go and our table still agree."""
    turns, golden = turns_of(name), GOLDENS[name]
    assert turns.go() == golden["go"], AGAIN
    render = tool.renderer(tool.chat_templates()[name])
    compared = 0
    for shape, messages in tool.conversations().items():
        assert golden["rendered"][shape] == turns.render(messages), shape
        wanted = render(messages, messages[-1]["role"] != "assistant")
        if wanted is None or shape in turns.missing:
            continue
        got, begun = golden["rendered"][shape], messages[-1]["role"] == "assistant"
        assert wanted.startswith(got) if begun else got == wanted, shape
        compared += 1
    assert compared >= 3


def test_what_cannot_be_said_is_named() -> None:
    assert "white space around a turn" in turns_of("llama3").missing
    assert "tools" in turns_of("qwen2_5").missing
    assert "two turns of the user in a row" in turns_of("tiny-llama").missing
    numbered = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    assert learned(tool.renderer(numbered)) is None
    assert modelfile("./x.gguf", tool.renderer(numbered), stops=[]) is None


def test_the_first_token_is_not_written_twice() -> None:
    render = tool.renderer(tool.chat_templates()["gemma3"])
    once = modelfile("./x.gguf", render, stops=["<end_of_turn>"], bos="<s>")
    twice = modelfile("./x.gguf", render, stops=["<end_of_turn>"])
    assert once is not None
    assert once.turns is not None
    assert twice is not None
    wanted = render(PLAIN["a conversation"], True)
    assert wanted is not None
    assert "<s>" + once.turns.render(PLAIN["a conversation"]) == wanted
    assert "<s>" not in once.text
    assert "<s>" in twice.text
    assert 'PARAMETER stop "<end_of_turn>"' in once.text


def test_the_default_system_turn() -> None:
    made = modelfile("./x.gguf", tool.renderer(tool.chat_templates()["qwen2_5"]), stops=["<|im_end|>"])
    assert made is not None
    assert 'SYSTEM "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."\n' in made.text
    plain = modelfile("./x.gguf", None, stops=[])
    assert plain is not None
    assert 'TEMPLATE """{{ .Prompt }}"""' in plain.text


def test_texts_that_mean_something_in_go() -> None:
    assert literal("a {b} c") == "a {b} c"
    assert literal("a {{ b }}") == '{{ print "a {{ b }}" }}'
    quotes = literal('say """')
    assert '"""' not in quotes


def test_turns_in_a_row_are_joined_as_ollama_does() -> None:
    two: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert joined(two) == [{"role": "user", "content": "a\n\nb"}]
    assert two[0]["content"] == "a"
