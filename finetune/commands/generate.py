"""`ft generate`: answers to the rows of a file or a pipe, each row whole and with its `prediction`, in their order.

read a window of rows -> make their prompts -> answer them, short ones first -> write what is done, in the rows' order.
No more than a window is in memory. A row that cannot be asked is written with `prediction: null` and `error`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash

from finetune.adapters.multiple import POLICY, ActiveAdapter, add_adapter
from finetune.base import Base
from finetune.data import asking
from finetune.data.asking import STDIN, Prompter
from finetune.data.thinking import switched
from finetune.data.types import Row
from finetune.errors import UserError
from finetune.evaluation.answering import COLUMN, ERRORS, THINKING, Wishes, Writer, answer_all
from finetune.evaluation.generation import not_followed, notice
from finetune.evaluation.options import overridden
from finetune.evaluation.targets import Target, model_target, plain_target, run_target
from finetune.models import adapter_files, hardware, sources, tokenizers
from finetune.models.identity import check_identity
from finetune.models.layouts import layout_of
from finetune.models.rope import context
from finetune.recipe.resolve import compute_dtype
from finetune.recipe.sections import ModelConfig
from finetune.run import appending
from finetune.run.writing import strict
from finetune.terminal.progress import note, say_json


def run(
    runs: Sequence[str], *, data: str, output: str, model: str | None = None, adapters: dict[str, str] | None = None,
    options: dict[str, Any] | None = None, max_new_tokens: int | None = None, batch_size: int | None = None, n: int = 1,
    system: str | None = None, raw: bool = False, columns: dict[str, str] | None = None, limit: int | None = None,
    resume: bool = False, overwrite: bool = False, thinking: str | None = None,
) -> None:  # fmt: skip
    """
    Args:
        adapters: by name. options: keys of eval.generation.
    """
    targets = targets_of(runs, model, adapters or {})
    first = targets[0]
    how = overridden(first.eval.generation, options or {})
    if n > 1 and not how.drawn:
        raise UserError(f"greedy answers are all the same, {n} of them, too", key="--n", fix="give --temperature")
    wishes = Wishes(
        how, max_new_tokens or first.eval.max_new_tokens, batch_size or first.eval.batch_size, n, system, raw,
        {**(first.data.columns or {}), **(columns or {})} or None, limit,
    )  # fmt: skip
    writers = [writer_of(target, wishes, thinking) for target in targets]
    note(f"answers: {how}, at most {wishes.max_new_tokens} tokens")
    for other in targets[1:]:
        if other.eval.generation != first.eval.generation:
            note(f"{other.name}: asked as {first.name} is, and not as its own recipe says ({other.eval.generation})")

    rows = asking.numbered(asking.rows_of(data), limit)
    if output == STDIN:
        answer_all(writers, wishes, rows, data, load, to_stdout)
        return
    path = Path(output).expanduser()
    appending.check(path, overwrite, resume)
    settings = settings_of(writers, wishes)
    seen, done, size = path.stat().st_size if path.exists() else 0, 0, 0
    if seen and not overwrite:
        appending.check_settings(path, settings)
        done, size = behind(path, rows, data, limit)
        note(f"{done:,} rows are answered in {output} already")
    if (following := next(rows, None)) is None:
        note("nothing is left to answer")
        return
    with appending.opened(path, size, seen, settings, {"data": data}) as file:
        answer_all(writers, wishes, chain([following], rows), data, load, appending.to(file), done)
    note(f"written to {output}")


def to_stdout(row: dict[str, Any]) -> None:
    say_json(strict(row), indent=None)
    sys.stdout.flush()


# --- what answers ---


def targets_of(runs: Sequence[str], model: str | None, adapters: dict[str, str]) -> list[Target]:
    """The models and adapters by name. UserError where several do not sit on one base."""
    found = [plain_target(run, model) for run in runs]
    found += [replace(run_target(reference, model), name=name) for name, reference in adapters.items()]
    found = found or [model_target(str(model))]
    scorer = next((target for target in found if target.scores is not None), None)
    if scorer is not None:
        what = "is a reward model: it scores answers and gives none"
        raise UserError(what, path=scorer.name, fix="give a run of another stage")
    if len(found) == 1:
        return found
    if twice := next((name for name, count in Counter(t.name for t in found).items() if count > 1), None):
        raise UserError(f"two are called {twice}", key="--adapter", fix="name them: --adapter NAME=PATH")
    one, kinds = found[0], set()
    for target in found:
        fix = "run ft generate once for each"
        if target.adapter is None:
            what = "is no adapter, and only adapters of one base answer together"
            raise UserError(what, path=target.name, fix=fix)
        if held_as(target.model) != held_as(one.model):
            raise UserError(f"has another base, or holds it otherwise, than {one.name}", path=target.name, fix=fix)
        kinds.add(adapter_files.described(target.adapter)["peft_type"])
        check_shares(target)
    if len(kinds) > 1:
        what = f"adapters of different kinds ({', '.join(sorted(kinds))}) cannot stand on one base in memory"
        raise UserError(what, key="--adapter", fix="run ft generate once for each")
    return found


def held_as(model: ModelConfig) -> tuple[Any, ...]:
    """What must be equal for two to share a base in memory."""
    return sources.folder(model).resolve(), model.quantization, model.quantization_type, model.rope_scaling


def check_shares(target: Target) -> None:
    """UserError for an adapter that changes the base that others share."""
    base = Base.open(target.model)
    assert target.adapter is not None
    native = layout_of(base.config)
    grown = native.tokenizer is None and tokenizers.added_tokens(target.model, target.adapter)
    if grown or adapter_files.own_embeddings(target.adapter) or native.adapter(target.adapter, base.config) is not None:
        what = "has embeddings or a layout of its own, and cannot share its base with other adapters"
        raise UserError(what, path=target.adapter, key="--adapter", fix="run ft generate for it alone")
    check_identity(target.adapter, base.folder, target.model.name)


def writer_of(target: Target, wishes: Wishes, thinking: str | None) -> Writer:
    # In the chat format that was trained.
    base = Base.open(target.model, target.adapter or target.template, target.treatment)
    encoder = base.asking(switched(thinking or target.eval.thinking), "--thinking" if thinking else "eval.thinking")
    longest = context(base.config, target.model)
    forged = target.data.on_forged_marker == "allow"
    return Writer(target, base, Prompter(encoder, wishes.system, wishes.raw, longest, forged))


def load(writers: Sequence[Writer]) -> None:
    """The base once, with all adapters on it."""
    machine, first = hardware.detect(), writers[0]
    dtype = getattr(torch, compute_dtype(first.target.model.dtype, machine))
    network = replace(first.base, adapter=first.target.adapter).load(dtype, machine).eval()
    first.network = ActiveAdapter(network, None if first.target.adapter is None else POLICY)
    for number, writer in enumerate(writers[1:], 1):
        assert writer.target.adapter is not None
        try:
            add_adapter(network, writer.target.adapter, name := f"beside_{number}")
        except UserError as error:
            raise UserError(error.problems[0].message, path=writer.target.adapter, fix="run it alone") from None
        writer.network = ActiveAdapter(network, name)
    network.eval()
    if (ignored := notice(not_followed(network))) is not None:
        note(ignored)


def settings_of(writers: Sequence[Writer], wishes: Wishes) -> dict[str, Any]:
    """All that an answer depends on; batches are none of it."""
    models = {}
    for writer in writers:
        target, adapter = writer.target, writer.target.adapter
        models[target.name] = {
            "model": target.model.name, "quantization": target.model.quantization, "base": writer.base.fingerprint,
            "adapter": None if adapter is None else digest(adapter_files.weights(adapter).read_bytes()),
            "template": digest(str(writer.prompter.encoder.template).encode()),
            "thinking": writer.prompter.encoder.asks,
        }  # fmt: skip
    asked = {"max_new_tokens": wishes.max_new_tokens, "n": wishes.n, "system": wishes.system, "raw": wishes.raw}
    return {"models": models, **wishes.how.chosen, **asked, "columns": wishes.columns}


def digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


# --- going on ---


def behind(path: Path, rows: Iterator[tuple[int, Row]], data: str, limit: int | None = None) -> tuple[int, int]:
    """(rows that are answered, bytes of their lines); these are taken off `rows`. UserError where they are others."""
    done = size = 0
    for line, length in appending.done_in(path):
        entry = next(rows, None)
        where: dict[str, Any] = {"path": path, "line": done + 1, "key": appending.KEY, "fix": appending.ANEW}
        if entry is None:
            what = f"holds more rows than are asked for of {data}"
            raise UserError(what, **{**where, "fix": f"{appending.ANEW} (or raise --limit)" if limit else where["fix"]})
        given = appending.jsonable(entry[1].data)
        if {key: line.get(key) for key in given} != strict(given) or line.keys() - given.keys() - {
            COLUMN,
            THINKING,
            *ERRORS,
        }:
            raise UserError(f"holds another row than {data} has here", **where)
        done, size = done + 1, size + length
    return done, size
