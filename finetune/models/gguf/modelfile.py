"""Ollama's Modelfile of a GGUF file: the chat template in Go's syntax, what ends an answer, what is said by default."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.models.gguf.places import MODELFILE
from finetune.models.gguf.turns import START, Render, Turns, learned

EXPORTED = "# Written by ft export."
COMPLETION = "{{ .Prompt }}"
"""TEMPLATE of a model without a chat template."""
DATES = ("strftime_now", "date_string")
QUOTES = '"""'


@dataclass(frozen=True)
class Modelfile:
    text: str
    missing: list[str]
    """What its template cannot say, in words."""
    turns: Turns | None


def modelfile(
    file: str, render: Render | None, *, stops: list[str], bos: str | None = None, template: str = "", about: str = "",
    adapter: str | None = None,
) -> Modelfile | None:  # fmt: skip
    """None where Go's templates cannot write what the chat template writes of the plainest conversations.

    Args:
        file: path of the GGUF file, ./NAME for one beside it; render: None for a model without a chat template; stops:
            tokens that end an answer; bos: the token that llama.cpp puts before a prompt by itself, which the template
            must not write again; template: the chat template's text; about: a line about the model; adapter: path of
            the adapter's GGUF file, where `file` is its base.
    """
    lines = [MODELFILE if adapter is None else EXPORTED, *([f"# {about}"] if about else []), f"FROM {file}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    if render is None:
        return Modelfile("\n".join([*lines, f"TEMPLATE {quoted(COMPLETION)}", ""]), [], None)
    found = learned(render)
    if found is None:
        return None
    missing = list(found.missing)
    if any(word in template for word in DATES):
        missing.append("today's date: it is that of the day on which this file was written")
    turns = without(found, bos)
    if missing:
        lines += ["# TEMPLATE writes what the model's chat template writes, but for:", *(f"# - {m}" for m in missing)]
    lines.append(f"TEMPLATE {quoted(turns.go())}")
    if turns.system and QUOTES not in turns.system:
        lines.append(f"SYSTEM {quoted(turns.system)}")
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops if '"' not in stop and "\n" not in stop]
    return Modelfile("\n".join([*lines, ""]), missing, turns)


def quoted(text: str) -> str:
    return f"{QUOTES}{text}{QUOTES}" if "\n" in text or '"' in text or "{{" in text else f'"{text}"'


def without(turns: Turns, bos: str | None) -> Turns:
    """The table without the first token, which llama.cpp adds."""
    if not bos:
        return turns
    between = {
        (before, role): text.removeprefix(bos) if before == START else text
        for (before, role), text in turns.between.items()
    }
    return dataclasses.replace(turns, between=between)
