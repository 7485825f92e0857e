"""What can be wrong in the options of `ft eval`, found without torch."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.metrics import asked
from finetune.places import check_file, json_with
from finetune.recipe.sections import DRAWING, GenerationConfig, HeldSet
from finetune.run.writing import read_lines


def check(
    runs: Sequence[str], recipe: str | None, model: str | None, adapter: str | None, data: str | Sequence[str] | None,
    json_file: str | None, quantization: str | None, predictions: str | None, named: Sequence[str] | None = None,
    thinking: str | None = None,
) -> None:  # fmt: skip
    """UserError for options that exclude each other, and for files that cannot be written."""
    if json_file not in (None, "-"):
        check_file(Path(str(json_file)), "--json", is_report)
    if predictions is not None:
        check_file(Path(predictions), "--predictions", is_predictions)
        for key, other in (("--json", json_file), *(("--data", one.path) for one in named_sets(data))):
            if other not in (None, "-") and Path(str(other)).resolve() == Path(predictions).resolve():
                raise UserError(f"is the file of {key}", path=predictions, key="--predictions", fix="name another file")
    if sum((bool(runs), recipe is not None, adapter is not None)) > 1:
        raise UserError("runs, --recipe and --adapter exclude each other", fix="give one of them")
    if not (runs or recipe is not None or adapter is not None or model is not None):
        raise UserError("nothing to evaluate", fix="give a run directory, --recipe, or --model")
    named_sets(data)
    quantizations(quantization)
    if named is not None and not named:
        raise UserError("names no metric", key="--metrics", fix="leave it out, or name one")
    asked.check(named or (), "--metrics")
    check_thinking(thinking)


def named_sets(data: str | Sequence[str] | None) -> list[HeldSet]:
    """Those of --data: a file, or NAME=FILE. UserError for no name and for two of one name."""
    found = []
    for text in [data] if isinstance(data, str) else data or ():
        if not text.strip():  # a variable of the shell that is not set; a path without a name is the working directory
            raise UserError("names no file", key="--data", fix="name one, or leave it out")
        name, equals, path = text.partition("=")
        is_named = equals and name and path and "/" not in name and not Path(text).expanduser().exists()
        found.append(HeldSet(name, path) if is_named else HeldSet(text, text))
    names = [one.name for one in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two sets are called {twice}", key="--data", fix="name them: --data NAME=FILE")
    return found


def no_rows() -> UserError:
    fix = "set it or data.eval_split in the recipe, or give --data FILE"
    return UserError("no held-out data", key="eval.data", fix=fix)


def is_report(path: Path) -> bool:
    """Whether a file is one of --json, of one set or of several."""
    return json_with("runs", "comparisons")(path) or json_with("sets")(path)


HARNESS = "lm_eval"


def tasks(text: str) -> list[str]:
    """The names in --tasks. UserError for none, places that are not there, and where the harness is not installed."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("names no task", key="--tasks", fix="name tasks of lm-evaluation-harness, or a task's folder")
    if importlib.util.find_spec(HARNESS) is None:
        fix = "pip install 'ft-recipes[bench]', or lm_eval alone"
        raise UserError("lm-evaluation-harness is not installed", key="--tasks", fix=fix)
    for name in names:
        place = Path(name).expanduser()
        if not place.exists() and ("/" in name or place.suffix in (".yaml", ".yml")):
            raise UserError("no such task", path=name, key="--tasks", fix="name a task's folder or its YAML file")
    return names


def check_thinking(word: str | None) -> None:
    if word not in (None, "on", "off"):
        raise UserError(f"unknown word {word!r}", key="--thinking", fix="one of on, off")


def is_predictions(path: Path) -> bool:
    """Whether a file is one of --predictions: every line a row of a run."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    if not (isinstance(row, dict) and {"run", "row", "loss"} <= row.keys()):
        return False
    return all({"run", "row"} <= row.keys() for row in read_lines(path))


def quantizations(text: str | None) -> list[str]:
    """`none,int8,int4` as a list."""
    kinds = [kind.strip() for kind in text.split(",")] if text else []
    for kind in kinds:
        if kind not in ("none", "int8", "int4"):
            raise UserError(f"unknown kind {kind!r}", key="--quantization", fix="a list of none, int8, int4")
    return kinds


def refuse(given: dict[str, Any], why: str) -> None:
    """UserError that names an option without effect. None, False, "" and nothing listed are not given; 0 is."""
    for key, value in given.items():
        if value or (value == 0 and value is not False):
            raise UserError(f"has no effect: {why}", key=key, fix="leave it out")


def overridden(settings: GenerationConfig, given: dict[str, Any]) -> GenerationConfig:
    """A recipe's settings with what options say in their place; None says nothing. UserError for options that do
    nothing beside the rest."""
    told = {key: value for key, value in given.items() if value is not None}
    option = {key: f"--{key.replace('_', '-')}" for key in told}
    for key, value in told.items():
        if not math.isfinite(value):
            raise UserError(f"{value} is no number to compute with", key=option[key], fix="give a finite one")
    found = GenerationConfig(**{**settings.model_dump(), **told})
    for key in option.keys() & set(DRAWING) if not found.drawn else ():
        raise UserError("has no effect: answers are greedy", key=option[key], fix="give --temperature above 0")
    if found.drawn and found.num_beams > 1:
        if told.get("num_beams", 1) > 1:
            raise UserError("beams are not drawn", key="--num-beams", fix="leave it or --temperature out")
        found = found.model_copy(update={"num_beams": 1})  # of the recipe, which was greedy
    return found


def written(given: dict[str, Any], n: int, system: str | None, raw: bool) -> None:
    """UserError for options of `ft generate` that cannot be, whatever a recipe says."""
    for key in ("top_p", "repetition_penalty"):
        if given[key] is not None and not given[key] > 0:
            raise UserError("must be above 0", key=f"--{key.replace('_', '-')}", fix="1 is without effect")
    if given["temperature"] is not None:
        overridden(GenerationConfig(), given)
    if n > 1 and given["temperature"] == 0:
        raise UserError(f"greedy answers are all the same, {n} of them, too", key="--n", fix="give --temperature")
    if raw and system is not None:
        raise UserError("has no effect: --raw writes no turns", key="--system", fix="leave one of them out")
