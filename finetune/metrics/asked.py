"""Metrics by name: `--metrics a,b` and `eval.metrics`. What is wrong with a name is said before a model is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import metrics
from finetune.errors import RunError, UserError
from finetune.metrics.metric import Metric, Row, of_texts, share, share_or_mean
from finetune.python_files import is_function, kept_running, load_function, parts_of

REGEX = "regex:"


def check(names: Sequence[str], key: str) -> None:
    """UserError for names of no metric, missing packages, broken patterns, and files that are not there."""
    for name in names:
        if name.startswith(REGEX):
            pattern_of(name, key)
        elif is_function(name):
            parts_of(name, key, "metric")
        else:
            rows = [metric for metric in metrics.METRICS if metric.name == name]
            if not rows:
                fix = f"write {name}:function" if name.endswith(".py") else nearest(name)
                raise UserError(f"no metric is called {name!r}", key=key, fix=fix)
            package = rows[0].package
            if package is not None and importlib.util.find_spec(package) is None:
                fix = f"pip install 'ft-recipes[eval]', or {package} alone"
                raise UserError(f"{name} needs {package}, which is not installed", key=key, fix=fix)


def nearest(name: str) -> str:
    known = list(dict.fromkeys(metric.name for metric in metrics.METRICS))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    also = "regex:PATTERN, file.py:function"
    return f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}, {also}"


def pattern_of(name: str, key: str) -> re.Pattern[str]:
    text = name.removeprefix(REGEX)
    try:
        found = re.compile(text)
    except re.error as error:
        what = f"{text!r} is no regular expression: {error}"
        raise UserError(what, key=key, fix="mend it; it goes up to the end of its --metrics") from None
    after = text.rpartition(",")[2].strip()
    if not text or any(after == metric.name for metric in metrics.METRICS):
        what = f"the pattern {text!r} ends with the name of a metric" if text else "the pattern is empty"
        raise UserError(what, key=key, fix="a pattern goes up to the end: name it last, or in a --metrics of its own")
    return found


def find(names: Sequence[str], kind: str, key: str) -> list[Metric]:
    """The metrics of these names for such rows. UserError for those that are of other rows."""
    check(names, key)
    found: list[Metric] = []
    for name in names:
        if name.startswith(REGEX):
            rows = [by_pattern(name, key)]
        elif is_function(name):
            rows = [by_function(name, key)]
        else:
            rows = [metric for metric in metrics.METRICS if metric.name == name]
        of_kind = [metric for metric in rows if kind in metric.kinds]
        if not of_kind:
            kinds = " and ".join(dict.fromkeys(kind for metric in rows for kind in metric.kinds))
            raise UserError(
                f"{name} is measured on {kinds}, and these rows are {kind}", key=key, fix="name others with --metrics"
            )
        found += of_kind
        if len({metric.name for metric in found}) < len(found):
            what = f"two metrics would be called {of_kind[0].name}"
            raise UserError(what, key=key, fix="give the function another name")
    return found


# --- regex:PATTERN ---


def by_pattern(name: str, key: str) -> Metric:
    """Of both sides the last match, of that the first group where there is one. A reference without a match is compared
    as it is, up to white space at its ends; an answer without one is wrong."""
    pattern = pattern_of(name, key)

    def taken(text: str) -> str | None:
        last: re.Match[str] | None = None
        for found in pattern.finditer(text):
            last = found
        return None if last is None else last[1] if pattern.groups else last[0]

    def same(prediction: str, reference: str) -> bool:
        expected = taken(reference)
        return taken(prediction) == (reference.strip() if expected is None else expected)

    what = "the last match counts and nothing else" + (", of it the first group" if pattern.groups else "")
    return Metric(name, ("answers",), of_texts(same), share, by_group=True, normalises=what)


# --- file.py:function ---


def by_function(spec: str, key: str) -> Metric:
    """function(prediction, reference, **columns) -> number, bool, or None for a row without a figure.

    Columns are those of the row's file that the function names, or all of them where it takes **columns.
    """
    function = load_function(spec, key, "metric")
    path, name = Path(spec.rpartition(":")[0]), spec.rpartition(":")[2]
    shown = f"{path.name}:{name}"
    accepted, required = arguments_of(function, path, name, key)

    def of_row(row: Row) -> float | None:
        where = f"{row.get('file')}, row {row.get('row')}"
        columns = {k: v for k, v in (row.get("columns") or {}).items() if accepted(k)}
        try:
            with kept_running():
                value = function(row["prediction"], row["reference"], **columns)
                number = None if value is None else float(value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit is no Exception
            raise RunError(f"{where}: {shown} failed: {type(error).__name__}: {error}") from error
        if isinstance(value, str) or (number is not None and not math.isfinite(number)):
            raise RunError(f"{where}: {shown} returned {value!r}: a finite number, a bool or None is wanted")
        return number

    return Metric(shown, ("answers",), of_row, share_or_mean, by_group=True, columns=required)


def arguments_of(
    function: Callable[..., Any], path: Path, name: str, key: str
) -> tuple[Callable[[str], bool], tuple[str, ...]]:
    """(which columns it is given, which it must be given). UserError when it takes no answer and reference."""
    fix = f"write def {name}(prediction, reference, **columns)"
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise UserError(f"{name} has no signature", path=path, key=key, fix=fix) from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise UserError(f"{name} does not take an answer and a reference", path=path, key=key, fix=fix)
    if inspect.iscoroutinefunction(function):
        raise UserError(f"{name} is a coroutine", path=path, key=key, fix=fix)
    taken = positional[:2]
    rest = [p for p in parameters if p not in taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names, first = {p.name for p in rest}, {p.name for p in taken if p.kind is not p.POSITIONAL_ONLY}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = tuple(p.name for p in rest if p.default is p.empty)
    return lambda column: column.isidentifier() and column not in first and (takes_all or column in names), required


# --- before anything is computed ---


def check_rows(chosen: Sequence[Metric], rows: Sequence[Mapping[str, Any]], key: str) -> None:
    """UserError for metrics that no row has, of rows whose references stand as their answers."""
    for metric in chosen:
        for row in rows if metric.columns else ():
            missing = [column for column in metric.columns if column not in row["columns"]]
            if missing:
                what = f"has no column {missing[0]!r}, which {metric.name} wants"
                raise UserError(what, path=row["file"], row=row["row"], key=key, fix="add it, or give it a default")
        if metric.needs == "reward":
            continue
        if metric.of_all is not None:
            found = any(row["reference"] is not None for row in rows)
        else:
            try:
                found = any(metric.function(row) is not None for row in rows)
            except RunError as error:
                raise UserError(f"{error} (tried with the reference as the answer)", key=key, fix="mend it") from None
        if not found:
            fix = "give rows with what it compares, or name another"
            raise UserError(f"{metric.name} is of none of these rows", key=key, fix=fix)
