"""Help in Chinese: typer's commands with the catalogue's texts, and lines as wide as a terminal shows them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

import typer
import typer.main
from rich.cells import cell_len

from finetune.language import translated

SPACE = 2
WIDEST = 30  # of the left column; longer options have a line to themselves, as in English
NOT_FIRST, NOT_LAST = "，。、；：！？）》」”…", "（《「“"
"""Signs that begin, and that end, no line."""
EXTRA = re.compile(r"(?:^|  )\[([^\[\]]*)\]$")


def in_chinese(app: typer.Typer) -> Any:
    """The command of `app`, whose help is Chinese."""
    command = typer.main.get_command(app)
    dress(command)
    return command


def dress(command: Any) -> None:
    """Give a command, and all below it, Chinese texts and a context that lays them out."""
    context = command.context_class
    formatter = type("Formatter", (Layout, context.formatter_class), {})
    command.context_class = type("Context", (context,), {"formatter_class": formatter})
    if command.help and not command.short_help:
        first = inspect.cleandoc(command.help).split("\n\n")[0]
        command.short_help = translated(" ".join(first.split())).partition("。")[0]
    for below in getattr(command, "commands", {}).values():
        dress(below)


class Layout:
    """Over typer's formatter of help: the same layout, with Chinese words and Chinese widths."""

    width: int
    current_indent: int

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        super().write_usage(prog, args, translated("Usage: ") if prefix is None else prefix)  # type: ignore[misc]

    def write_heading(self, heading: str) -> None:
        self.write(f"{' ' * self.current_indent}{translated(heading)}：\n")

    def write_text(self, text: str) -> None:
        indent, paragraphs = " " * self.current_indent, []
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.split("\n")
            if lines[0].strip() == "\b":  # to be left as it stands
                lines = [translated(line) for line in lines[1:]]
            else:
                lines = wrapped(translated(" ".join(paragraph.split())), self.width - self.current_indent)
            paragraphs.append("".join(f"{indent}{line}\n" for line in lines))
        self.write("\n".join(paragraphs))

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = WIDEST, col_spacing: int = SPACE) -> None:
        indent = " " * self.current_indent
        left = min(max(cell_len(name) for name, _ in rows), col_max) + col_spacing
        for name, text in rows:
            lines = wrapped(of_option(text), max(self.width - left - 2, 10)) or [""]
            if cell_len(name) > left - col_spacing:
                self.write(f"{indent}{name}\n")
                name = ""
            for line in lines:
                self.write(f"{indent}{name}{' ' * (left - cell_len(name))}{line}".rstrip() + "\n")
                name = ""

    def write(self, text: str) -> None:
        super().write(text)  # type: ignore[misc]


def of_option(text: str) -> str:
    """The help of an option, `…  [default: 3]`, or of a command, which is Chinese already."""
    if re.search("[一-鿿]", text):
        return text
    found = EXTRA.search(text)
    help_ = translated(" ".join(text[: found.start()].split() if found else text.split()))
    extra = "" if found is None else f"[{'；'.join(map(translated, found[1].split('; ')))}]"
    return "  ".join(filter(None, [help_, extra]))


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns: broken at spaces and between Chinese characters, never before a full stop."""
    lines, line = [], ""
    for piece in re.findall(rf"\s+|[{NOT_LAST}]*(?:[!-~]+|\S)[{NOT_FIRST}]*", text):
        if line and cell_len(line + piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece if line else piece.lstrip()
    return [*lines, line.rstrip()] if line.strip() else lines
