"""Answers on a terminal or in a pipe, while they are written: one, or two beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.errors import visible
from finetune.evaluation.streaming import Show
from finetune.terminal.progress import note, output, say

NARROW = 80  # columns; below that two answers stand one below the other


class Screen:
    def __init__(self, hidden: bool = False) -> None:
        self.hidden = hidden
        """Thinking is not shown."""

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[list[Show]]:
        """What each side's text goes to; one side at a time."""
        if len(names) > 1 and output.is_terminal and not output.is_dumb_terminal and output.width >= NARROW:
            columns = Columns(names, self.hidden)
            try:
                with Live(columns, console=output, transient=True, refresh_per_second=8):
                    yield columns.shows
            finally:
                columns.live = False
                output.print(columns)
            return
        one_by_one = [OneByOne(self.hidden, name if len(names) > 1 else None, i > 0) for i, name in enumerate(names)]
        try:
            yield [one.show for one in one_by_one]
        except BrokenPipeError:
            raise
        except BaseException:
            if output.is_terminal:
                say("")
            raise
        for one in one_by_one:
            one.begin()  # of an empty answer the name
        say("", flush=True)


class OneByOne:
    """As it comes; thinking dim where the terminal has such letters."""

    def __init__(self, hidden: bool, name: str | None = None, below: bool = False) -> None:
        self.hidden, self.name, self.below = hidden, name, below
        self.begun = self.thought = self.told = False

    def begin(self) -> None:
        if self.name is not None and not self.begun:
            say(("\n\n" if self.below else "") + f"[{self.name}]", flush=True)
        self.begun = True

    def show(self, text: str, thinks: bool) -> None:
        self.begin()
        if thinks and self.hidden:
            if output.is_terminal and not self.told:
                note("thinking …", "dim")
            self.told = True
            return
        if self.thought and not thinks:
            say("")
        self.thought = thinks
        if thinks and output.is_terminal and not output.no_color:
            output.print(visible(text), style="dim", end="", soft_wrap=True)
            output.file.flush()
        else:
            say(text, end="", flush=True)


class Columns:
    """Sides beside each other; while they are written, as much of their ends as the terminal is high."""

    def __init__(self, names: Sequence[str], hidden: bool) -> None:
        self.names, self.hidden, self.live = names, hidden, True
        self.texts = [Text() for _ in names]
        self.thought = [False] * len(names)
        self.shows: list[Show] = [self.show_of(side) for side in range(len(names))]

    def show_of(self, side: int) -> Show:
        def show(text: str, thinks: bool) -> None:
            if thinks and self.hidden:
                return
            if self.thought[side] and not thinks:
                self.texts[side].append("\n")
            self.thought[side] = thinks
            self.texts[side].append(visible(text), "dim" if thinks else None)

        return show

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = (options.max_width - 3) // len(self.names)
        table = Table.grid(padding=(0, 3, 0, 0))
        for _ in self.names:
            table.add_column(width=width, overflow="fold")
        table.add_row(*(Text(visible(name), "bold") for name in self.names))
        lines = [list(text.copy().wrap(console, width)) for text in self.texts]
        if self.live:
            lines = [found[-max(console.height - 2, 1) :] for found in lines]
        table.add_row(*(Text("\n").join(found) for found in lines))
        yield table
