"""The Chinese catalogue against the source: `python tools/zh_catalogue.py` prints what is missing, stale or broken.

`--missing FILE` writes the missing entries as JSON with empty translations; fill them in, and `--add FILE` takes them
into finetune/language/zh.json, which has one entry a line, sorted. `--drop` takes stale ones out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from zh_messages import Messages

from finetune.language import CATALOGUE, HOLE

FOREIGN = {
    "typer": [
        "Usage: {0}",
        "Try {0} for help.",
        "Error: {a}",
        "Options",
        "Arguments",
        "Commands",
        "Show this message and exit.",
        "Example:",
        "Examples:",
        "default: {0}",
        "env var: {0}",
        "required",
        "Missing command.",
        "No such command {0}.",
        "No such command {0}. Did you mean {1}?",
        "Usage: ",
        "No such option: {0}",
        "No such option: {0} (Possible options: {1})",
        "Got unexpected extra argument ({0})",
        "Got unexpected extra argument(s) ({0})",
        "Invalid value for {0}: {a}",
        "Invalid value: {a}",
        "Missing argument {0}.",
        "Missing option {0}.",
        "Missing parameter: {0}",
        "Option {0} does not take a value.",
        "Option {0} requires an argument.",
        "Option {0} requires {1} arguments.",
    ],
    "pydantic": [
        "Input should be a valid integer, unable to parse string as an integer",
        "Input should be a valid number, unable to parse string as a number",
        "Input should be a valid boolean, unable to interpret input",
        "Input should be greater than {0}",
        "Input should be greater than or equal to {0}",
        "Input should be less than {0}",
        "Input should be less than or equal to {0}",
        "Input should be a finite number",
        "a number greater than {0}",
        "a number greater than or equal to {0}",
        "a number less than {0}",
        "a number less than or equal to {0}",
        "a finite number",
        "one of {0} or {1}",
        "a valid integer, got a number with a fractional part",
    ],
    "yaml": [
        "found character {0} that cannot start any token",
        "expected {0}, but found {1}",
        "expected {0}, but got {1}",
        "expected {0} or {1}, but got {2}",
        "but found another document",
        "mapping values are not allowed here",
        "could not determine a constructor for the tag {0}",
        "could not find expected {0}",
        "unacceptable character {0}: special characters are not allowed",
        "nested too deeply",
        "expected a mapping or list of mappings for merging, but found scalar",
        "month must be in 1..12",
    ],
    "json": [
        "Expecting property name enclosed in double quotes",
        "Expecting value",
        "Expecting ',' delimiter",
        "Expecting ':' delimiter",
        "Unterminated string starting at",
        "Extra data",
        "Invalid control character at",
        "Illegal trailing comma before end of object",
        "Illegal trailing comma before end of array",
        "Invalid control character",
        "{a}: line {0} column {1} (char {2})",
    ],
    "ft": [
        "row {0}",
        "line {0}",
        "line {0}: {a}",
        "process {0}: {a}",
        "rows",
        "… and {0} more problems",
        "number",
        "number {0}",
        "whole number",
        "whole number {0}",
        "text",
        "list of {a}",
        "a number of thousands of digits",
        "ft dpo or ft reward",
        "any value",
        "mapping",
        "must be given",
        "unset",
        "recipe",
        "data",
        "versions",
        "optimizer step",
        "the backward pass",
        "the end of the forward pass",
        "the loss's backward pass",
        "writing replies",
        "wrong answers",
        "pairs the wrong way round",
        "on the wrong side",
        "exactly",
        "nearly ({0} of the prompt's passages or more)",
        "as the same question under another system turn",
        "answer",
        "right",
        "good",
        "bad",
        "preferred",
        "running",
        "content of",
        "held-out",
        "model.dtype: auto is {0}: a block of the model, forward and backward, takes {1} ms in bfloat16 and {2} in "
        "float32",
        "original weights",
        "dequantized weights",
        "weights",
        "tokens per second",
        "exact match",
        "json valid",
        "field accuracy",
        "perplexity",
        "loss",
        "asked",
        "reference",
        "row",
        "all weights",
        "LoRA on INT4",
        "LoRA on bfloat16",
        "interrupted",
        "done",
        "failed",
        "default",
    ],
    "python": [
        "invalid start byte",
        "invalid continuation byte",
        "unexpected end of data",
        "invalid syntax",
        "'utf-8' codec can't decode byte {0} in position {1}: {a}",
        "missing ), unterminated subpattern at position {0}",
        "Compressed file ended before the end-of-stream marker was reached",
        "nothing to repeat at position {0}",
    ],
    "arrow, safetensors, jinja": [
        "Not an Arrow file",
        "Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.",
        "Error while deserializing header: incomplete metadata, file not fully covered",
        "Unexpected end of template. Jinja was looking for the following tags: {0} or {1}. The innermost block that "
        "needs to be closed is {2}.",
    ],
    "system": [
        "No such file or directory",
        "Permission denied",
        "Is a directory",
        "Not a directory",
        "File name too long",
        "No space left on device",
        "Read-only file system",
        "File exists",
    ],
}
"""What other libraries say within our messages, and words that no message is followed back to."""


def of_commands(command: Any, path: str = "ft") -> Iterator[tuple[str, str]]:
    """(text, place) of a command's help and those below it."""
    for text in (command.help, getattr(command, "epilog", None)):
        for paragraph in re.split(r"\n\s*\n", text or ""):
            if (line := " ".join(paragraph.split())) and "\b" not in paragraph:
                yield line, path
    for parameter in command.params:
        if getattr(parameter, "help", None):
            yield " ".join(parameter.help.split()), f"{path} {parameter.name}"
    for name, below in getattr(command, "commands", {}).items():
        yield from of_commands(below, f"{path} {name}")


def of_recipes() -> Iterator[tuple[str, str]]:
    from finetune.recipe.reference import keys

    for key in keys():
        if key.description:
            yield key.description, f"recipe key {key.name}"


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def templates() -> dict[str, str]:
    """Every text that is shown in Chinese -> where it is written."""
    from finetune.cli.commands import app

    found = {text: f"in {library}" for library, texts in FOREIGN.items() for text in texts}
    for text, place in (*of_commands(typer.main.get_command(app)), *of_recipes()):
        found.setdefault(escaped(text), place)
    for text, place in Messages().all().items():
        found.setdefault(text, place)
    return dict(sorted(found.items()))


def holes(text: str) -> list[str]:
    return sorted(HOLE.findall(text.replace("{{", "").replace("}}", "")))


def wrong(catalogue: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """A line for everything that is not as it should be."""
    lines = [f"missing ({wanted[text]}): {text}" for text in wanted if not catalogue.get(text)]
    lines += [f"stale: {text}" for text in catalogue if text not in wanted]
    lines += [
        f"other values in {translation!r} than in {text!r}"
        for text, translation in catalogue.items()
        if translation and holes(text) != holes(translation)
    ]
    lines += [
        f"{', '.join(sorted(other))} in only one of {text!r} and {translation!r}"
        for text, translation in catalogue.items()
        if translation and (other := code(text) ^ code(translation))
    ]  # fmt: skip
    return lines


CODE = re.compile(
    r"(?<![\w-])--[a-z][\w-]+|`[^`{]+`|\b[a-z]\w*\.[a-z]\w+\b|\b[a-z]+_[a-z_]+\b|\b[A-Z]+_[A-Z_]+\b|arXiv:[\d.]+"
)
"""What is typed or looked for as it stands: options, keys, variables, commands."""


def code(text: str) -> set[str]:
    return set(CODE.findall(HOLE.sub("", text))) - {"e.g"}


def read(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def written(catalogue: dict[str, str]) -> str:
    return json.dumps(catalogue, ensure_ascii=False, indent=0, sort_keys=True) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", type=Path, metavar="FILE")
    parser.add_argument("--add", type=Path, metavar="FILE")
    parser.add_argument("--drop", action="store_true")
    given = parser.parse_args()
    catalogue, wanted = read(CATALOGUE), templates()
    if given.add:
        catalogue |= {text: translation for text, translation in read(given.add).items() if translation}
    if given.drop:
        catalogue = {text: translation for text, translation in catalogue.items() if text in wanted}
    if given.add or given.drop:
        CATALOGUE.write_text(written(catalogue), encoding="utf-8")
    if given.missing:
        missing = {text: "" for text in wanted if not catalogue.get(text)}
        given.missing.write_text(written(missing), encoding="utf-8")
    lines = wrong(catalogue, wanted)
    print("\n".join(lines) if lines else f"{len(wanted)} texts, all in Chinese")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
