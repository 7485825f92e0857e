"""What `ft` can say, read from the source: the templates of errors, warnings and help, for tools/zh_catalogue.py.

A message is followed from where it is raised (SINKS) back to its words: through names, constants, conditions, sums,
what functions return, and parameters to those who call. A template has its values as {0}, {1}, …; what is itself one of
our sentences, of which there are too many to write all out, as {a}, {b}, ….
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from zh_source import (
    FUNCTIONS,
    Function,
    Items,
    Scope,
    annotation,
    argument,
    bindings,
    caught,
    defaults,
    is_name,
    is_sentence,
    name_of,
    of_fromkeys,
    own,
    parts_of,
    read,
    walk,
)  # fmt: skip

ROOT = Path(__file__).parent.parent
# function -> the parameters that people read, by position and by name.
SINKS: dict[str, dict[str, int]] = {
    "Problem": {"message": 0, "fix": -1}, "UserError": {"problems": 0, "fix": -1}, "RunError": {"message": 0},
    "OutOfMemory": {"message": 0}, "Interrupted": {"message": 0}, "warn": {"message": 0}, "warn_if": {"message": 0},
    "translated": {"text": 0}, "found": {"line": 0}, "_print_errors": {"lines": 0},
    "note": {"message": 0}, "tell": {"text": 0}, "advise": {"message": 0}, "task": {"what": 0, "unit": 2},
    "Finding": {"message": 2, "fix": 3}, "error": {"message": 1, "fix": 2}, "warning": {"message": 1, "fix": 2},
    "RowProblem": {"message": 1, "fix": 2},
}  # fmt: skip
ATTRIBUTES = {
    "message", "fix", "why", "instead", "reason", "what", "said", "limit", "needs", "not_mergeable", "not_quantizable",
}  # fmt: skip
"""Fields of tables' rows that are sentences."""
ROWS = {"Refused"}
"""Tables all of whose fields are."""
TABLES = {"STAGES"}
"""Tables that are computed; what they hold stands in zh_catalogue.FOREIGN."""
LINES = ("adapters.", "data.", "evaluation.", "models.", "rl.", "training.")
"""Where functions that return lines return what is told, and keys of dicts are reasons."""
WRITTEN = ("training.model_card", "commands.export", "cli.chinese", "evaluation.report", "data.shown", "data.preview")
"""What these make goes into a file, or is translated already."""
BUILT_IN = {*dir(str), *dir(list), *dir(dict)}  # `text.split()` is no function of ours
SILENT = {"write_atomically", "write", "write_text", "tokens", "encode"}
"""Functions whose texts are written or read, not told."""
SAMPLES = {"models.gguf.vocabulary", "commands.merge", "commands.recipes"}
"""Modules with tuples of texts that are tried, or written."""
MOST = 6  # ways that a sentence may be put together before its parts become sentences of their own
VALUE, PROSE = object(), object()  # of a template: what comes from the user, and what is ours
Parts = tuple[object, ...]


class Messages:
    def __init__(self, package: Path = ROOT / "finetune") -> None:
        self.modules = [read(path, package) for path in sorted(package.rglob("*.py"))]
        self.defined: dict[str, list[tuple[ast.FunctionDef, Scope]]] = {}
        self.pairs: list[tuple[ast.Tuple, Scope]] = []
        """(message, fix)."""
        self.raised: list[tuple[ast.Call, Scope]] = []
        self.calls: dict[str, list[tuple[ast.Call, Scope]]] = {}
        for module in self.modules:
            module.nodes = walk(module.tree, Scope(module))
            for node, scope in module.nodes:
                if (
                    module.name in WRITTEN
                    and isinstance(node, ast.Call)
                    and name_of(node.func) in ("write", "write_text")
                ):
                    continue
                if isinstance(node, FUNCTIONS):
                    self.defined.setdefault(node.name, []).append((node, scope))  # type: ignore[arg-type]
                elif isinstance(node, ast.Call):
                    self.calls.setdefault(name_of(node.func), []).append((node, scope))
                elif (
                    isinstance(node, ast.Tuple) and sum(map(is_sentence, node.elts)) > 1 and module.name not in SAMPLES
                ):
                    self.pairs.append((node, scope))
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    self.raised.append((node.exc, scope))
        self.known: dict[int, tuple[ast.expr, list[Parts]]] = {}
        self.fields: dict[str, list[tuple[str, int]]] = {}
        """Field -> the classes that have it, and where."""
        for module in self.modules:
            for node, _ in module.nodes:
                if isinstance(node, ast.ClassDef):
                    names = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)
                             and isinstance(n.target, ast.Name)]  # fmt: skip
                    for i, name in enumerate(names):
                        self.fields.setdefault(name, []).append((node.name, i))
        self.sinks = {name: dict(parameters) for name, parameters in SINKS.items()}
        self.found: dict[str, str] = {}
        """Template -> a place where it is written."""

    def all(self) -> dict[str, str]:
        done: set[tuple[str, str]] = set()
        while todo := {(f, p) for f, ps in self.sinks.items() for p in ps} - done:
            for function, parameter in sorted(todo):
                done.add((function, parameter))
                for call, scope in self.calls.get(function, ()):
                    if (given := argument(call, parameter, self.sinks[function][parameter])) is not None:
                        self.say(given, scope)
        for call, scope in self.raised:
            if name_of(call.func) == "ValueError" or scope.module.name.startswith("serving."):
                continue  # what clients are told, in JSON, stays English
            for given in call.args:
                if isinstance(given, ast.Constant | ast.JoinedStr | ast.Name):
                    self.say(given, scope)
        for given, scope in self.lines():
            if isinstance(given, ast.JoinedStr) or is_sentence(given):
                self.say(given, scope)
        for pair, scope in self.pairs:
            for given in pair.elts:
                if isinstance(given, ast.Constant | ast.JoinedStr | ast.BinOp):
                    self.say(given, scope)
        for call, scope in self.calls.get("ValueError", ()):
            if call.args:  # of pydantic's validators `key: message`
                for text, place in self.texts(call.args[0], scope):
                    head, _, rest = text.partition(": ")
                    self.found.setdefault(text if " " in head or not rest else numbered(rest), place)
        return dict(sorted(self.found.items()))

    def lines(self) -> Iterator[tuple[ast.expr, Scope]]:
        """Lines that functions return, and reasons that are keys."""
        for module in self.modules:
            if not module.name.startswith(LINES) or module.name in (*WRITTEN, *SAMPLES):
                continue
            for node, scope in module.nodes:
                if isinstance(node, FUNCTIONS) and node.returns is not None:
                    if ast.unparse(node.returns) in ("list[str]", "Iterator[str]", "Iterable[str]", "Sequence[str]"):
                        yield from self.made(node, scope, 0)
                elif isinstance(node, ast.Dict):
                    yield from ((key, scope) for key in node.keys if key is not None and not is_name(key))

    def say(self, given: ast.expr, scope: Scope) -> None:
        for text, place in self.texts(given, scope):
            self.found.setdefault(text, place)

    def texts(self, given: ast.expr, scope: Scope) -> Iterator[tuple[str, str]]:
        place = f"{scope.module.name.replace('.', '/')}.py:{given.lineno}"
        if isinstance(given, ast.List):
            for one in given.elts:
                yield from self.texts(one, scope)
        for parts in self.ways(given, scope):
            if is_words(text := template(parts)):
                yield text, place

    def ways(self, given: ast.expr, scope: Scope) -> list[Parts]:
        """The ways in which an expression is put together: each its parts, text or VALUE or PROSE."""
        if id(given) not in self.known:
            self.known[id(given)] = given, [(VALUE,)]  # for one that leads back to itself
            self.known[id(given)] = given, self.ways_of(given, scope)
        return self.known[id(given)][1]

    def ways_of(self, given: ast.expr, scope: Scope) -> list[Parts]:
        unknown: list[Parts] = [(VALUE,)]
        match given:
            case ast.Constant(value=str(text)):
                return [(text,)] if text else [()]
            case ast.Constant(value=None):
                return []
            case ast.JoinedStr(values=values):
                return self.together([self.ways(part, scope) for part in values], values, scope)
            case ast.FormattedValue(value=value, conversion=conversion, format_spec=spec):
                return unknown if conversion != -1 or spec is not None else self.ways(value, scope)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                sides = [left, right]
                return self.together([self.ways(part, scope) for part in sides], sides, scope)
            case ast.IfExp(body=body, orelse=orelse):
                return unique([*self.ways(body, scope), *self.ways(orelse, scope)])
            case ast.BoolOp(values=values):
                return unique([way for part in values for way in self.ways(part, scope)])
            case ast.NamedExpr(value=value):
                return self.ways(value, scope)
            case ast.Name(id=name):
                return self.of_name(name, scope)
            case ast.Subscript(value=ast.Call(func=ast.Name(id=name)), slice=ast.Constant(value=int(at))):
                return self.of_call(name, scope, at)
            case ast.Call() | ast.Attribute() | ast.Subscript() if any(
                isinstance(node, ast.Name) and caught(node.id, scope) for node in ast.walk(given)
            ):
                return [(PROSE,)]  # what a library says
            case (
                ast.Subscript(value=ast.Name() as name)
                | ast.Call(func=ast.Attribute(value=ast.Name() as name, attr="get"))
            ):
                return self.of_table(name.id, scope)
            case Items(found=found):
                return unique([way for one, where in found for way in self.ways(one, where)]) or unknown
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str()), attr="join"), args=[listed]):
                texts = [template(way) for one, where in self.items(listed, scope) for way in self.ways(one, where)]
                return self.pieces(texts, scope, given) or unknown
            case ast.Call(func=ast.Name(id="translated")):
                return unknown
            case ast.Attribute(attr=name) if name in ATTRIBUTES:
                return self.of_field(name)
            case ast.Attribute(value=ast.Name(id=row), attr=name) if (kind := annotation(row, scope)) in ROWS:
                return self.of_field(name, kind)
            case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
                return self.of_call(name, scope)
        return unknown

    def together(self, pieces: list[list[Parts]], nodes: list[ast.expr], scope: Scope) -> list[Parts]:
        """Every way, or with {a} where there were too many of a piece."""
        count = 1
        for i, (ways, node) in enumerate(zip(pieces, nodes, strict=True)):
            if count * len(ways) > MOST or (len(ways) > 1 and (VALUE,) in ways):
                pieces[i] = self.pieces(list(map(template, ways)), scope, node) or [(VALUE,)]
            texts = [template(way) for way in ways]
            if len(ways) > 2 and all(len(text.split()) < 3 and not text.startswith(("a ", "an ")) for text in texts):
                pieces[i] = [(VALUE,)]  # names
            count *= len(pieces[i])
        return unique([tuple(part for way in ways for part in way) for ways in itertools.product(*pieces)])

    def pieces(self, texts: list[str], scope: Scope, node: ast.expr) -> list[Parts]:
        """{a} for what may be any of several texts, each with an entry of its own; nothing where they are names."""
        texts = list(filter(is_words, texts))
        if not any(" " in text for text in texts):
            return []
        for text in texts:
            self.found.setdefault(text, f"{scope.module.name.replace('.', '/')}.py:{node.lineno}")
        return [(PROSE,)]

    def items(self, listed: ast.expr, scope: Scope, deep: int = 0) -> list[tuple[ast.expr, Scope]]:
        """What a list holds, as far as its making can be followed."""
        if deep > 6:
            return []
        more = deep + 1
        match listed:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [item for one in elements for item in (
                    self.items(one.value, scope, more) if isinstance(one, ast.Starred) else [(one, scope)]
                )]  # fmt: skip
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return [(element, scope)]
            case ast.BinOp(left=left, right=right):
                return [*self.items(left, scope, more), *self.items(right, scope, more)]
            case ast.IfExp(body=body, orelse=orelse):
                return [*self.items(body, scope, more), *self.items(orelse, scope, more)]
            case ast.Call(func=ast.Attribute(value=ast.Name(id=table), attr="values")):
                tables = [node for node in scope.module.constants.get(table, ()) if isinstance(node, ast.Dict)]
                return [(value, Scope(scope.module)) for node in tables for value in node.values]
            case ast.Call(func=ast.Name(id="sorted" | "list" | "filter"), args=arguments):
                return self.items(arguments[-1], scope, more)
            case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
                return [
                    item for function, where in self.functions(name, scope) for item in self.made(function, where, more)
                ]
            case ast.Name(id=name) if scope.functions:
                found = []
                for node in own(scope.functions[-1]):
                    match node:
                        case ast.Call(func=ast.Attribute(value=ast.Name(id=one), attr="append"), args=[value]):
                            found += [(value, scope)] if one == name else []
                        case (
                            ast.Assign(targets=[ast.Name(id=one)], value=value)
                            | ast.AugAssign(target=ast.Name(id=one), value=value)
                            | ast.AnnAssign(target=ast.Name(id=one), value=ast.expr() as value)
                        ):
                            found += self.items(value, scope, more) if one == name else []
                return found
        return []

    def made(self, function: Function, where: Scope, deep: int) -> list[tuple[ast.expr, Scope]]:
        """What a function returns a list of, or yields."""
        here, found = Scope(where.module, (*where.functions, function)), []
        for node in own(function):
            match node:
                case ast.Return(value=ast.expr() as value) | ast.YieldFrom(value=value):
                    found += self.items(value, here, deep)
                case ast.Yield(value=ast.expr() as value):
                    found.append((value, here))
        return found

    def functions(self, name: str, where: Scope) -> list[tuple[ast.FunctionDef, Scope]]:
        """Those that a name may mean: of the same module or the imported one before any other."""
        homes = (where.module.name, where.module.imported.get(name))
        found = [] if name in BUILT_IN else self.defined.get(name, [])
        return [one for one in found if one[1].module.name in homes] or found

    def bindings(self, function: ast.AST, name: str, scope: Scope) -> Iterator[ast.expr | None]:
        """What a name is set to in a function; None for what cannot be followed."""
        for value in bindings(function, name, scope.module):
            if isinstance(value, Items):
                value.found = self.items(value.listed, scope)
            yield value

    def of_name(self, name: str, scope: Scope) -> list[Parts]:
        for i in range(len(scope.functions) - 1, -1, -1):
            function, here = scope.functions[i], Scope(scope.module, scope.functions[: i + 1])
            if caught(name, here):
                return [(PROSE,)]
            bound = list(self.bindings(function, name, here))
            if bound:
                return unique([way for one in bound for way in (self.ways(one, here) if one else [(VALUE,)])])
            parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            if name in parameters:
                if isinstance(function, ast.Lambda):
                    return [(VALUE,)]
                kind = annotation(name, here)
                given = self.given(function, name, parameters) if not kind or "str" in kind.split(" | ") else []
                return given or [(VALUE,)]
        if name in scope.module.constants:
            return unique([way for one in scope.module.constants[name] for way in self.ways(one, Scope(scope.module))])
        if (origin := scope.module.imported.get(name)) is not None:
            other = next((m for m in self.modules if m.name == origin), None)
            if other is not None and name in other.constants:
                return unique([way for one in other.constants[name] for way in self.ways(one, Scope(other))])
        return [(VALUE,)]

    def given(self, function: Function, name: str, parameters: list[str]) -> list[Parts]:
        """What callers give as a parameter."""
        if function.name in SILENT:
            return []
        ways: list[Parts] = []
        default = defaults(function).get(name)
        at = parameters.index(name) - (parameters[:1] == ["self"] and parameters[0] == "self")
        positional = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        for call, scope in self.calls.get(function.name, ()):
            found = argument(call, name, at if name in positional else -1)
            found = default if found is None else found
            ways += [(VALUE,)] if found is None else self.ways(found, scope)
        return unique(ways)

    def of_table(self, name: str, scope: Scope) -> list[Parts]:
        """The texts that a constant dict holds."""
        if name in TABLES:
            return [(PROSE,)]
        module = scope.module
        if name not in module.constants and (origin := module.imported.get(name)) is not None:
            module = next((m for m in self.modules if m.name == origin), module)
        tables = [node for node in module.constants.get(name, ()) if isinstance(node, ast.Dict)]
        values = [of_fromkeys(value) for table in tables for value in table.values]
        if values and all(isinstance(v, ast.Constant | ast.JoinedStr | ast.BinOp | ast.Name) for v in values):
            return unique([way for value in values for way in self.ways(value, Scope(module))])
        return [(VALUE,)]

    def of_field(self, name: str, of: str | None = None) -> list[Parts]:
        """What is given as a field of that name where rows (of one kind) are made."""
        ways: list[Parts] = []
        for kind, at in self.fields.get(name, ()):
            if of not in (kind, None):
                continue
            for call, scope in self.calls.get(kind, ()):
                if (found := argument(call, name, at)) is not None:
                    ways += self.ways(found, scope)
        return unique(ways) or [(VALUE,)]

    def of_call(self, name: str, where: Scope, at: int | None = None) -> list[Parts]:
        """What a function of the package returns, where that is text, or the part `at` of a tuple that it returns."""
        ways: list[Parts] = []
        for function, scope in self.functions(name, where):
            kind = "" if function.returns is None else ast.unparse(function.returns)
            if at is None and "str" not in kind.split(" | "):
                return [(VALUE,)]
            here = Scope(scope.module, (*scope.functions, function))
            for node in own(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    ways += [way for value in parts_of(node.value, at) for way in self.ways(value, here)]
        return unique(ways) or [(VALUE,)]


def numbered(text: str) -> str:
    """What is left of a template with its numbers from zero on."""
    numbers = dict.fromkeys(re.findall(r"\{(\d)\}", text))
    return re.sub(r"\{(\d)\}", lambda found: f"{{{list(numbers).index(found[1])}}}", text)


def is_words(text: str) -> bool:
    """Whether a template says anything of its own: a lone name is a value."""
    literal = re.sub(r"\{\w\}", "", text).strip(" .,:;")
    if text.startswith("#") or "\n" in text:  # of a file that is written
        return False
    if re.match(r"ft [a-z{]", text) and not re.search(r"\b(and|in|is|or|this|with)\b", text):  # a command
        return False
    if re.search(r"\{[a-h]\}", text):
        return text != "{a}"
    return bool(re.search(r"[A-Za-z]{2}", literal)) and (" " in literal or literal.isalpha())


def unique(ways: list[Parts]) -> list[Parts]:
    return list(dict.fromkeys(ways))


def template(parts: Parts) -> str:
    """`{0} holds {a}`; braces of the text itself are doubled."""
    values, proses, text = itertools.count(), iter("abcdefgh"), ""
    for part in parts:
        if part is VALUE:
            text += f"{{{next(values)}}}"
        elif part is PROSE:
            text += f"{{{next(proses)}}}"
        else:
            text += str(part).replace("{", "{{").replace("}", "}}")
    return text
