"""Python source for tools/zh_messages.py: modules as trees, what stands in them, and what a name is set to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Items(ast.expr):
    """One of what a list holds."""

    def __init__(self, listed: ast.expr) -> None:
        super().__init__(lineno=listed.lineno)
        self.listed = listed
        self.found: list[tuple[ast.expr, Scope]] = []


@dataclass
class Module:
    name: str
    tree: ast.Module
    constants: dict[str, list[ast.expr]] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    nodes: list[tuple[ast.AST, Scope]] = field(default_factory=list)


@dataclass
class Scope:
    module: Module
    functions: tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, ...] = ()
    """The innermost last."""


def read(path: Path, package: Path) -> Module:
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    module = Module(name, ast.parse(path.read_text(encoding="utf-8")))
    for node in module.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    module.constants.setdefault(target.id, []).append(node.value)
    for found in ast.walk(module.tree):
        if isinstance(found, ast.ImportFrom) and (found.module or "").startswith("finetune."):
            module.imported |= {alias.asname or alias.name: str(found.module)[9:] for alias in found.names}
    return module


def walk(node: ast.AST, scope: Scope) -> list[tuple[ast.AST, Scope]]:
    """All nodes, each with the functions that it stands in."""
    found: list[tuple[ast.AST, Scope]] = []
    for child in ast.iter_child_nodes(node):
        found.append((child, scope))
        inside = isinstance(child, (*FUNCTIONS, ast.Lambda))
        found += walk(child, Scope(scope.module, (*scope.functions, child)) if inside else scope)  # type: ignore[arg-type]
    return found


@cache
def own(function: ast.AST) -> list[ast.AST]:
    """The nodes of a function without those of functions within it."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        found.append(child)
        if not isinstance(child, (*FUNCTIONS, ast.Lambda)):
            found += own(child)
    return found


@cache
def exceptions(function: ast.AST) -> set[str | None]:
    """`except … as NAME`"""
    return {node.name for node in own(function) if isinstance(node, ast.ExceptHandler)}


def bindings(function: ast.AST, name: str, module: Module) -> Iterator[ast.expr | None]:
    """What a name is set to in a function; None for what cannot be followed."""
    for node in own(function):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    yield from bound(target, value, name)
            case ast.AnnAssign(target=ast.Name(id=found), value=value) if found == name and value is not None:
                yield value
            case ast.NamedExpr(target=ast.Name(id=found), value=value) if found == name:
                yield value
            case ast.AugAssign(target=ast.Name(id=found), value=value) if found == name:
                yield value
            case ast.For(target=target, iter=over) | ast.comprehension(target=target, iter=over):
                if any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(target)):
                    if isinstance(over, ast.Name) and over.id in module.constants:
                        over = module.constants[over.id][0]
                    if isinstance(over, ast.Tuple | ast.List):
                        for one in over.elts:
                            yield from bound(target, one, name)
                    elif isinstance(target, ast.Tuple) and (table := items_of(over, module)) is not None:
                        for key, value in zip(table.keys, map(of_fromkeys, table.values), strict=True):
                            yield from bound(target, ast.Tuple([key, value]), name)  # type: ignore[list-item]
                    elif isinstance(target, ast.Name):
                        yield Items(over)
                    else:
                        yield None
            case ast.withitem(optional_vars=ast.Name(id=found)) if found == name:
                yield None


def items_of(over: ast.expr, module: Module) -> ast.Dict | None:
    """The dict of `{…}.items()`, or of a constant's."""
    if not (isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) and over.func.attr == "items"):
        return None
    table: ast.expr = over.func.value
    if isinstance(table, ast.Name):
        table = next(iter(module.constants.get(table.id, ())), table)
    return table if isinstance(table, ast.Dict) else None


def bound(target: ast.expr, value: ast.expr, name: str) -> Iterator[ast.expr | None]:
    if isinstance(target, ast.Name):
        if target.id == name:
            yield value
    elif isinstance(target, ast.Tuple):
        names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        if name not in names:
            return
        if isinstance(value, ast.IfExp):
            yield from bound(target, value.body, name)
            yield from bound(target, value.orelse, name)
        elif isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            for one, given in zip(target.elts, value.elts, strict=True):
                yield from bound(one, given, name)
        elif isinstance(value, ast.Call) and all(isinstance(one, ast.Name) for one in target.elts):
            yield ast.Subscript(value, ast.Constant(names.index(name)), lineno=value.lineno)
        else:
            yield None


def is_sentence(node: ast.expr) -> bool:
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        return any(isinstance(n, ast.Constant) and is_sentence(n) for n in ast.walk(node))
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip().count(" ") > 0


def is_name(node: ast.expr) -> bool:
    """A text of one or two words."""
    return isinstance(node, ast.Constant) and str(node.value).count(" ") < 2


def parts_of(value: ast.expr, at: int | None) -> list[ast.expr]:
    """The part `at` of what is returned, in each of its ways."""
    match value:
        case ast.IfExp(body=body, orelse=orelse):
            return [*parts_of(body, at), *parts_of(orelse, at)]
        case ast.Call(func=ast.Name(id="next"), args=[ast.GeneratorExp(elt=element), *_]):
            return parts_of(element, at)
        case ast.Tuple(elts=elements) if at is not None:
            return elements[at : at + 1]
    return [value] if at is None else []


def of_fromkeys(value: ast.expr) -> ast.expr:
    """What dict.fromkeys gives all its keys."""
    return value.args[1] if isinstance(value, ast.Call) and name_of(value.func) == "fromkeys" else value


def caught(name: str, scope: Scope) -> bool:
    """Whether it is an exception."""
    return any(name in exceptions(function) for function in scope.functions[-1:])


def annotation(name: str, scope: Scope) -> str:
    """Of a parameter."""
    arguments = [a for f in scope.functions[-1:] for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
    found = next((ast.unparse(a.annotation) for a in arguments if a.arg == name and a.annotation is not None), "")
    return found.removesuffix(" | None")


def argument(call: ast.Call, name: str, at: int) -> ast.expr | None:
    named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    if named is None and 0 <= at < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args[: at + 1]):
        return call.args[at]
    return named


def defaults(function: Function) -> dict[str, ast.expr]:
    args = function.args
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    found = dict(zip(positional[len(positional) - len(args.defaults) :], args.defaults, strict=True))
    return found | {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None}


def name_of(function: ast.expr) -> str:
    return getattr(function, "id", getattr(function, "attr", ""))
