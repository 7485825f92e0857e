"""`ft generate`: answers to the rows of a file or a pipe, each row whole and with its `prediction`, in their order.

read a window of rows -> make their prompts -> answer them, short ones first -> write what is done, in the rows' order.
No more than a window is in memory. A row that cannot be asked is written with `prediction: null` and `error`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from finetune.data import asking
from finetune.data.asking import STDIN
from finetune.data.types import Row
from finetune.errors import Interrupted, UserError
from finetune.evaluation.answering import COLUMN, ERRORS, THINKING, Wishes, Writer, answer_all
from finetune.evaluation.options import overridden
from finetune.evaluation.writers import load, targets_of, writer_of
from finetune.models import adapter_files
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
        {**(first.data.columns or {}), **(columns or {})} or None, limit, tuple((columns or {}).values()),
    )  # fmt: skip
    writers = [writer_of(target, wishes.system, wishes.raw, thinking) for target in targets]
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
        try:
            answer_all(writers, wishes, chain([following], rows), data, load, appending.to(file), done)
        except KeyboardInterrupt:
            what = f"interrupted; the rows that are answered stay in {output}"
            raise Interrupted(what, add=["--resume"], drop=["--overwrite"]) from None
    note(f"written to {output}")


def to_stdout(row: dict[str, Any]) -> None:
    say_json(strict(row), indent=None)
    sys.stdout.flush()


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
