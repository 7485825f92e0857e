"""A chat template is a program that comes with a checkpoint: what it may take of time and memory.

transformers runs it in jinja2's sandbox, from which no code of Python is reached; a loop without end, or a text of
gigabytes, is not kept from it. So every loop, call, filter and text that is put together is counted here: the template
is parsed, its expressions are wrapped in filters that count, and then compiled in transformers' own environment.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sized
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

LARGEST_TEMPLATE = 1 << 20  # characters; the largest published one has 30,000
LARGEST_TEXT = 1 << 26  # characters that a template puts together; a row has fewer
MOST_ITEMS = 1 << 20  # of a list
MOST_ROUNDS = 20_000_000  # of all loops of one rendering
SECONDS = 10.0  # of processor time for one rendering, which takes less than a millisecond
LARGEST_ARGUMENT = 100_000  # whole number: widths, counts
LONG = 64  # characters of fixed text that are counted when they are written
EVERY = 256  # counts between looks at the clock


class TooMuch(Exception):
    """What a template took too much of."""


class Spent(threading.local):
    """What the rendering of this thread has taken so far."""

    def begin(self) -> None:
        self.count = self.rounds = self.written = 0
        self.look = EVERY
        self.until = time.thread_time() + SECONDS

    def take(self, size: int) -> None:
        self.count += 1 + (size >> 10)
        if self.count >= self.look:
            self.look = self.count + EVERY
            if time.thread_time() > self.until:
                raise TooMuch(f"it takes longer than {SECONDS:.0f} seconds")

    def write(self, size: int) -> None:
        self.written += size
        if self.written > LARGEST_TEXT:
            raise TooMuch(f"it writes more than {LARGEST_TEXT >> 20} million characters")


SPENT = Spent()


def size_of(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict | set) else 0


def check_size(size: int, text: bool) -> None:
    if size > (LARGEST_TEXT if text else MOST_ITEMS):
        what = f"a text of more than {LARGEST_TEXT >> 20} million characters" if text else "a list of a million items"
        raise TooMuch(f"it makes {what}")


@jinja2.pass_context  # so that nothing is computed while compiling
def counted(_: Any, value: Any) -> Any:
    """A value that was put together, called for, or is compared."""
    size = size_of(value)
    check_size(size, isinstance(value, str))
    SPENT.take(size)
    return value


@jinja2.pass_context
def written(_: Any, value: Any) -> Any:
    SPENT.write(size_of(value))
    return counted(_, value)


@jinja2.pass_context
def rounds(_: Any, value: Any) -> Any:
    """What a loop runs over."""

    def one_by_one() -> Any:
        for item in value:
            add(1)
            yield item

    def add(number: int) -> None:
        SPENT.rounds += number
        SPENT.take(number)
        if SPENT.rounds > MOST_ROUNDS:
            raise TooMuch(f"its loops take more than {MOST_ROUNDS:,} rounds")

    if isinstance(value, jinja2.Undefined) or not hasattr(value, "__iter__"):
        return value  # jinja2 says what is wrong with it
    if isinstance(value, Sized):
        add(len(value))
        return value
    return one_by_one()


@jinja2.pass_context
def argument(_: Any, value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST_ARGUMENT:
        raise TooMuch(f"it asks for {value:,} of something")
    return value


def times(left: Any, right: Any) -> Any:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple) and isinstance(other, int):
            check_size(len(one) * other, isinstance(one, str))
    check_digits(left, right)
    return left * right


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 10_000:
        raise TooMuch("it computes a number of thousands of digits")
    return left**right


def check_digits(*values: Any) -> None:
    if sum(value.bit_length() for value in values if isinstance(value, int)) > 10_000:
        raise TooMuch("it computes a number of thousands of digits")


def modulo(left: Any, right: Any) -> Any:
    check_format(left)
    return left % right


def check_format(text: Any) -> None:
    """Widths in a format may be numbers of any length, or come with the values."""
    if isinstance(text, str) and re.search(r"\d{6,}|%[-+ #0]*\*|\{[^{}]*\{", text):
        raise TooMuch("it formats to a width of millions")


def replaced(text: str, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    return len(text) + text.count(str(old)) * len(str(new))


def indented(text: str, width: Any = 4, *_: Any, **__: Any) -> int:
    return len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width))


def joined(items: Any, between: Any = "", *_: Any, **__: Any) -> int:
    parts = items if isinstance(items, list | tuple) else ()
    return size_of(items) * len(str(between)) + sum(map(size_of, parts))


def expanded(text: str, width: int = 8, **_: Any) -> int:
    return len(text) + text.count("\t") * width


LONGER: dict[str, Callable[..., int]] = {
    "replace": replaced, "indent": indented, "join": joined, "expandtabs": expanded,
}  # fmt: skip
"""What makes a long text of short ones -> its length at most, of a value and its arguments."""


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of `LONGER`, refused where it would make too much."""
    passed = hasattr(function, "jinja_pass_arg")  # then the first argument is the context or the environment

    @wraps(function)
    def instead(*arguments: Any, **named: Any) -> Any:
        value, *more = arguments[passed:]
        check_longer(name, value if isinstance(value, list | tuple) else str(value), more, named)
        return function(*arguments, **named)

    return instead


def check_longer(name: str, value: Any, arguments: Any, named: dict[str, Any]) -> None:
    if isinstance(value, str) or name == "join":
        check_size(LONGER[name](value, *arguments, **named), text=True)


@jinja2.pass_context
def called(context: Any, value: Any, name: str, *arguments: Any, **named: Any) -> Any:
    """A method of a text: value.name(…)."""
    if isinstance(value, str):
        if name == "format":
            check_format(value)
        elif name == "join":
            items = list(arguments[0]) if arguments else []
            check_longer(name, items, [value], {})
            arguments = (items,)
        elif name in LONGER:
            check_longer(name, value, arguments, named)
    environment = context.environment
    return environment.call(context, environment.getattr(value, name), *arguments, **named)


METHODS = {*LONGER, "format", "format_map"}
FILTERS = {
    "ft_counted": counted, "ft_written": written, "ft_rounds": rounds, "ft_argument": argument, "ft_called": called,
}  # fmt: skip


class Counting(NodeTransformer):
    """Wraps what takes time or memory."""

    def wrap(self, node: Any, name: str, *arguments: Any) -> Any:
        return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)

    def arguments(self, node: Any) -> None:
        node.args = [self.wrap(argument, "ft_argument") for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = self.wrap(keyword.value, "ft_argument")

    def visit_For(self, node: Any) -> Any:
        self.generic_visit(node)
        node.iter = self.wrap(node.iter, "ft_rounds")
        return node

    def visit_Call(self, node: Any) -> Any:
        self.generic_visit(node)
        self.arguments(node)
        if (
            isinstance(node.node, nodes.Getattr)
            and node.node.attr in METHODS
            and not (node.dyn_args or node.dyn_kwargs)
        ):
            name = nodes.Const(node.node.attr, lineno=node.lineno)
            made = nodes.Filter(node.node.node, "ft_called", [name, *node.args], node.kwargs, None, None)
            return self.wrap(made.set_lineno(node.lineno), "ft_counted")
        return self.wrap(node, "ft_counted")

    def visit_Filter(self, node: Any) -> Any:
        self.generic_visit(node)
        self.arguments(node)
        if node.node is not None:
            node.node = self.wrap(node.node, "ft_counted")
        return self.wrap(node, "ft_counted")

    def visit_CallBlock(self, node: Any) -> Any:
        """Its call has to stay one."""
        self.generic_visit(node.call)
        node.body = [self.visit(part) for part in node.body]
        return node

    def visit_FilterBlock(self, node: Any) -> Any:
        self.generic_visit(node.filter)
        self.arguments(node.filter)
        node.body = [self.visit(part) for part in node.body]
        return node

    def visit_Output(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [self.shown(part) for part in node.nodes]
        return node

    def shown(self, node: Any) -> Any:
        if not isinstance(node, nodes.TemplateData):
            return self.wrap(node, "ft_written")
        if len(node.data) <= LONG:
            return node
        return self.wrap(nodes.Const(node.data, lineno=node.lineno), "ft_written")

    def visit_Compare(self, node: Any) -> Any:
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = self.wrap(operand.expr, "ft_counted")
        return node

    def visit_Getitem(self, node: Any) -> Any:
        self.generic_visit(node)
        return self.wrap(node, "ft_counted") if isinstance(node.arg, nodes.Slice) and node.ctx == "load" else node

    def _put_together(self, node: Any) -> Any:
        self.generic_visit(node)
        return self.wrap(node, "ft_counted")

    visit_Concat = visit_Add = visit_Mul = visit_Mod = visit_Pow = _put_together


def limited(environment: Any, text: str) -> Any:
    """The template, ready to be rendered. jinja2's TemplateSyntaxError where it is none, or too large."""
    if len(text) > LARGEST_TEMPLATE:
        raise jinja2.TemplateSyntaxError(f"it is larger than {LARGEST_TEMPLATE >> 20} MiB", 1)
    own = environment.overlay(optimized=False)
    own.filters = {n: guarded(n, f) if n in LONGER else f for n, f in environment.filters.items()} | FILTERS
    own.filters["format"] = checked_format(environment.filters["format"])
    own.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    own.intercepted_binops = frozenset({"*", "**", "%"})
    own.binop_table = {**environment.binop_table, "*": times, "**": power, "%": modulo}
    try:
        return own.from_string(Counting().visit(own.parse(text)))
    except RecursionError:
        raise jinja2.TemplateSyntaxError("it is nested too deeply", 1) from None


def checked_format(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def instead(value: Any, *arguments: Any, **named: Any) -> Any:
        check_format(str(value))
        return function(value, *arguments, **named)

    return instead
