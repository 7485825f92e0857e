"""Files that people give: what stands at a path that is no file, and JSON that has to hold a mapping."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from finetune.errors import UserError

AGAIN = "download or copy it again"
SPECIAL = (
    (stat.S_ISFIFO, "is a pipe, and it is read more than once", "write it to a file first"),
    (stat.S_ISSOCK, "is a socket", "give a file"),
    (stat.S_ISCHR, "is a device", "give a file"),
    (stat.S_ISBLK, "is a device", "give a file"),
)


def odd(path: Path) -> tuple[str, str] | None:
    """(message, fix) for what stands at a path and is neither a file nor a folder; None for these, and for nothing."""
    try:
        if path.is_file() or path.is_dir():
            return None
        if path.is_symlink() and not path.exists():
            where = path.readlink()
            gone = "which is not there" if where.name != path.name else "to itself"
            return f"is a link to {where}, {gone}", "mend the link, or give the file itself"
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError):  # of a loop of links older Pythons make a RuntimeError
        return ("is a link to itself", "give the file itself") if path.is_symlink() else None
    return next(((what, fix) for is_one, what, fix in SPECIAL if is_one(mode)), None)


def is_address(text: str) -> bool:
    """https://…, s3://…"""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.isalnum()


def mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds one mapping. UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError("is not JSON (nested too deeply)", path=path, fix=AGAIN) from None
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", path=path, fix=AGAIN) from None
    except PermissionError as error:
        raise UserError(f"cannot be read: {error.strerror}", path=path, fix="check the file's permissions") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", path=path, fix=AGAIN) from None
    if not isinstance(found, dict):
        raise UserError("is JSON, but no mapping of names to values", path=path, fix=AGAIN)
    return found
