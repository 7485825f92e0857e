"""What a run reads, by content: a run that goes on must find the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.base import Base
from finetune.data import sources as data_sources
from finetune.data import text as raw
from finetune.errors import Problem, UserError
from finetune.models import sources
from finetune.models.identity import fingerprint
from finetune.python_files import is_function
from finetune.recipe.stages import PpoRecipe, Recipe
from finetune.run.records import flat
from finetune.run.resuming import check_unchanged
from finetune.terminal.progress import task


def known_inputs(
    recipe: Recipe, base: Base, template: str | None, resume: bool, dry_run: bool = False
) -> dict[str, str]:
    """{key: digest} of what a run reads, by content: base, tokenizer, template, adapter and data.

    UserError naming what is not as it was, when the run is to go on; a dry run that is not to go on reads nothing.
    """
    if dry_run and not resume:
        return {}
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(base.tokenizer.get_vocab().items()))
    with task("reading the base for its fingerprint", after=1.0):
        found = {"model.tokenizer" if base.model.is_new else "model.name": digest([base.fingerprint, vocabulary])}
    if template is not None:
        found["model.chat_template"] = digest([template])
    if recipe.model.adapter is not None:
        found["model.adapter"] = digest(_weights(sources.adapter_folder(recipe.model.adapter)))
    found["data.train"] = digest(_rows(recipe.data.train))
    if recipe.eval.paths is not None:
        found["eval.data"] = digest(_rows([data_sources.held_out(path) for path in recipe.eval.paths]))
    if recipe.eval.during is not None and recipe.eval.shots_from is not None:
        found["eval.shots_from"] = digest(_rows(recipe.eval.shots_from))
    named = (recipe.eval.during.metrics if recipe.eval.during is not None else None) or ()
    if functions := [name for name in named if is_function(name)]:
        found["eval.during.metrics"] = digest(_functions(functions))
    if isinstance(recipe, PpoRecipe):
        found |= _reward_inputs(recipe.reward)
    if resume:
        check_unchanged(recipe, found)
    return found


Stamps = dict[str, tuple[int, int, int]]


def stamps(recipe: Recipe) -> Stamps:
    """{local file of data.train and eval.data: what changes when it is written to}."""
    found: Stamps = {}
    specs = data_sources.as_dicts(recipe.data.train)
    specs += [data_sources.held_out(path) for path in recipe.eval.paths or ()]
    for spec in specs:
        with suppress(UserError, OSError):  # what is not there is refused where it is read
            for file in data_sources.local_files([spec]) or ():
                seen = file.stat()
                found[str(file)] = (seen.st_size, seen.st_mtime_ns, seen.st_ino)
    return found


def check_still(recipe: Recipe, before: Stamps) -> None:
    """UserError for data that was written to since: rows of both states may have been read."""
    after = stamps(recipe)
    what, fix = "has changed while it was read", "start again when nothing writes to it any more"
    problems = [Problem(what, path=path, key="data", fix=fix) for path in before if before[path] != after.get(path)]
    if problems:
        raise UserError(problems)


def _reward_inputs(reward: Any) -> dict[str, str]:
    """Pairs, the reward model where it is on this machine, and the rules' files."""
    found = {}
    if reward.train is not None:
        found["reward.train"] = digest(_rows(reward.train))
    if reward.model is not None:
        adapter = sources.find_adapter(reward.model)
        place = Path(reward.model).expanduser()
        folder = adapter or next((p for p in (place / "model", place) if p.is_dir()), None)
        found["reward.model"] = digest([reward.model] if folder is None else _weights(folder))
    if reward.functions:
        found["reward.functions"] = digest(_functions(reward.functions))
    return found


def _functions(named: Sequence[str]) -> Iterator[str | bytes]:
    """Of file.py:function."""
    for file, name in (one.rpartition(":")[::2] for one in named):
        yield from (Path(file).read_bytes(), name)


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256 and number of bytes."""
    found, size = hashlib.sha256(), 0
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
    return f"{found.hexdigest()} {size}"


def _weights(folder: Path) -> Iterator[str | bytes]:
    """Of a model or an adapter."""
    files = sorted(folder.glob("adapter_*"))
    yield from (file.read_bytes() for file in files)
    if not files:
        yield fingerprint(folder)


def _rows(data: Any) -> Iterator[str | bytes]:
    """What sources hold: the bytes of their files, or the rows of a hub."""
    for source in data if isinstance(data, list) else [data]:
        spec = data_sources.as_dict(source)
        if str(spec["path"]) == raw.WORLD:
            yield raw.WORLD
        elif data_sources.is_hub(spec) or spec.get("source") == "modelscope":
            yield from (repr(row.data) for row in data_sources.read_rows(source))
        else:
            for file in data_sources.files_of(spec["path"], spec.get("split")):
                with file.open("rb") as stream:
                    yield from iter(lambda stream=stream: stream.read(1 << 22), b"")  # type: ignore[misc]


def asked_of_all(recipe: Recipe) -> dict[str, Any]:
    """{key: value} of what must be the same in every process of a run; folders may have other names."""
    values = flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in values.items() if "/" not in str(value)}
