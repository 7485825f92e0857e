"""`--json FILE|-` of the commands that print a table: the same as JSON, in a file or on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.places import check_file, json_with
from finetune.run.writing import strict, write_json
from finetune.terminal.progress import note, say_json


def check(json_file: str | None, *keys: str) -> None:
    """UserError for what cannot be written; a file that has `keys` is an earlier one of ours and may be replaced."""
    if json_file is not None and json_file != "-":
        check_file(Path(json_file), "--json", json_with(*keys))


def write(json_file: str | None, value: dict[str, Any], indent: int | None = 2) -> None:
    if json_file == "-":
        say_json(strict(value), indent)
    elif json_file is not None:
        write_json(Path(json_file), value)
        note(f"written to {json_file}")
