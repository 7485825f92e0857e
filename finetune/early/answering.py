"""`ft chat`, `serve` and `generate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune import places
from finetune.early.evaluating import evaluated_one
from finetune.early.inputs import adapter_and_base, check_not_read, rows, there, together
from finetune.errors import UserError
from finetune.evaluation import options
from finetune.models import sources
from finetune.recipe.resolve import absolute_data
from finetune.recipe.sections import ModelConfig
from finetune.run import appending
from finetune.serving import address


def chat(
    listed: Sequence[str], model: str | None, adapters: Sequence[str], settings: dict[str, Any] | None = None,
    system: str | None = None, thinking: str | None = None, command: str = "ft chat",
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft chat` and `ft serve`. UserError when there is nothing to talk to."""
    options.check_thinking(thinking)
    if settings is not None:
        options.written(settings, 1, system, raw=False)
    runs, named = list(listed), named_adapters(adapters)
    if len(runs) == 1 and sources.what_is(runs[0]) == "model":
        if model is not None:
            raise UserError(f"given twice: {runs[0]} and --model {model}", fix="give one of them")
        if named:
            model, runs = runs[0], []  # ft chat MODEL --adapter A
    if not (runs or named or model is not None):
        raise UserError("no model to talk to", fix=f"write {command} RUN, or give --model or --adapter")
    if not runs and not named:
        there(ModelConfig(name=str(model)))
    together(*(lambda name=name: talker(name, model, name in named.values()) for name in (*runs, *named.values())))
    return runs, model, named


def served(
    listed: Sequence[str], model: str | None, adapters: Sequence[str], host: str, port: int, api_key: str | None,
    thinking: str | None = None, timeout: float = 600,
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft serve`. UserError for what cannot be served, or not there."""
    found: list[tuple[list[str], str | None, dict[str, str]]] = []
    together(
        server_extra,
        lambda: found.append(chat(listed, model, adapters, None, None, thinking, "ft serve")),
        lambda: address.check(host, port),
        lambda: check_key(api_key),
        lambda: check_seconds(timeout),
    )
    return found[0]


def server_extra() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise UserError(what, key="ft serve", fix="pip install 'ft-recipes[serve]'")


def check_seconds(timeout: float) -> None:
    if not 0 < timeout <= 1e6:  # nan, inf: no clock takes them
        raise UserError("must be seconds, at most a million", key="--timeout", fix="leave it out for ten minutes")


def check_key(api_key: str | None) -> None:
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        what = "must be printable ASCII without spaces around it" if api_key else "is empty"
        raise UserError(what, key="--api-key", fix="give another one, or unset FT_API_KEY")


def talker(name: str, model: str | None, is_adapter: bool) -> None:
    """UserError for what is not there, and for a reward model."""
    if not is_adapter and sources.what_is(name) == "model":
        there(ModelConfig(name=name))
        return
    folder = adapter_and_base(name, model)
    if places.read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS":
        what = "is a reward model: it scores answers and gives none"
        raise UserError(what, path=name, fix="give a run of another stage; ft eval scores pairs with it")


def generated(
    runs: Sequence[str], model: str | None, adapters: Sequence[str], data: str, output: str, overwrite: bool,
    resume: bool, settings: dict[str, Any], n: int, system: str | None, raw: bool, thinking: str | None = None,
) -> tuple[list[str], str | None, dict[str, str]]:  # fmt: skip
    """(runs, --model, adapters by name) of `ft generate`. UserError for what is not there, or cannot be written."""
    listed = list(runs)
    if len(listed) == 1 and adapters and model is None and sources.find_adapter(listed[0]) is None:
        model, listed = listed[0], []  # ft generate MODEL --adapter A
    named = named_adapters(adapters)
    if not (listed or named or model is not None):
        raise UserError("no model to answer", fix="write ft generate RUN --data FILE --output FILE, or give --model")
    checks: list[Callable[[], object]] = [
        lambda: answers_file(output, data, overwrite, resume), lambda: options.written(settings, n, system, raw),
        lambda: options.check_thinking(thinking),
    ]  # fmt: skip
    if data != "-":
        checks.append(lambda: rows(absolute_data(data), "--data", held_out=True))
    for name in (*listed, *named.values()):
        checks.append(lambda name=name: evaluated_one(name, model, name in named.values(), False))  # type: ignore[misc]
    if model is not None and not listed and not named:
        checks.append(lambda: there(ModelConfig(name=model)))
    together(*checks)
    return listed, model, named


def named_adapters(adapters: Sequence[str]) -> dict[str, str]:
    """Name -> place. UserError for two of one name."""
    named = dict(map(named_adapter, adapters))
    if len(named) < len(adapters):
        raise UserError("two adapters have one name", key="--adapter", fix="name them: --adapter NAME=PATH")
    return named


def named_adapter(text: str) -> tuple[str, str]:
    """(name, place) of NAME=PLACE, or of a place alone, which is called as its folder is."""
    name, equals, place = text.partition("=")
    if equals and name and place and not Path(text).expanduser().exists():
        return name, place
    path = Path(text).expanduser()
    return path.name or path.resolve().name, text


def answers_file(output: str, data: str, overwrite: bool, resume: bool) -> None:
    """UserError when answers cannot be written there, or would be read again."""
    if output == "-":
        if resume or overwrite:
            key = "--resume" if resume else "--overwrite"
            raise UserError("has no effect on stdout", key=key, fix="leave it out, or name a file")
        return
    path = Path(output).expanduser()
    if data != "-":
        check_not_read(path, data, "--output", appending.beside(path))
    appending.check(path, overwrite, resume)
