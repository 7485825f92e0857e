"""Files whole or not at all, and JSON lines of which a kill may have cut the last one off."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from finetune import places


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(as_line, rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of our own JSON lines. What a kill or a full disk has cut off is left out.

    A line ends at a newline only: texts may hold U+2028, at which str.splitlines would cut.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def as_line(row: dict[str, Any]) -> str:
    return json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whole or not at all, also after a power cut. Never through a link: one at `path` is replaced itself."""
    temporary = places.fresh(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    places.sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, escaped(json.dumps(strict(value), ensure_ascii=False, indent=2, allow_nan=False)) + "\n")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, all or none."""
    write_atomically(path, "".join(f"{escaped(as_line(row).rstrip())}\n" for row in rows))


def escaped(text: str) -> str:
    """JSON as it is, or in ASCII where it holds halves of surrogate pairs, of rows or of file names."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2 if "\n" in text else None)
    return text
