"""Functions of a user's Python file: rules of `ft ppo`, metrics of `ft eval`."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from finetune.errors import UserError


def is_function(name: str) -> bool:
    """Whether a metric's name is file.py:function, and no name of ours or regex:PATTERN."""
    return not name.startswith("regex:") and re.search(r"\.py:\w*$", name) is not None


def parts_of(spec: str, key: str, what: str) -> tuple[Path, str]:
    """(file, function) of file.py:function. UserError when there is no such file."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UserError(f"not a {what}: {spec!r}", key=key, fix="write file.py:function")
    if not path.is_file():
        raise UserError("no such file", path=path, key=key, fix="give a Python file")
    if path.suffix != ".py":
        raise UserError("is no Python file", path=path, key=key, fix="its name must end with .py")
    check_source(path, name, key)
    return path, name


def check_source(path: Path, name: str, key: str) -> None:
    """UserError for a file that is no Python, or in which `name` is bound nowhere. Nothing of it is run."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise UserError(f"is no Python ({error.msg})", path=path, line=error.lineno, key=key, fix="mend it") from None
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes; nesting
        raise UserError(f"is no Python ({error})", path=path, key=key, fix="mend it") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    bound = set(functions)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name):
            bound.add(node.id)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
    if name not in bound and "*" not in bound and not {"globals", "setattr", "__getattr__", "exec"} & bound:
        fix = f"functions: {', '.join(functions) or 'none'}"
        raise UserError(f"has no function {name}", path=path, key=key, fix=fix)


def load_function(spec: str, key: str, what: str) -> Callable[..., Any]:
    """file.py:function. UserError when there is none."""
    path, name = parts_of(spec, key, what)
    module_spec = importlib.util.spec_from_file_location(f"ft_rule_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)  # as dataclasses want it
    try:
        with kept_running():
            module_spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit is no Exception
        said = f"cannot be imported ({type(error).__name__}: {error})"
        raise UserError(said, path=path, key=key, fix="mend the file") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = ", ".join(n for n, f in vars(module).items() if inspect.isfunction(f)) or "none"
        raise UserError(f"has no function {name}", path=path, key=key, fix=f"functions: {names}")
    found: Callable[..., Any] = function
    return found


@contextmanager
def kept_running() -> Iterator[None]:
    """Within, os._exit of this process is an exception, as sys.exit is: a rule must not end a run as if it were done.
    A rule that took the function at its import keeps this one."""
    leave, own = os._exit, os.getpid()

    def instead(status: int) -> NoReturn:
        if os.getpid() != own:  # the child of a fork, which has to end so
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = instead
    try:
        yield
    finally:
        os._exit = leave
