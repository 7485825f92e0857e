"""Errors and how they are shown.

    FinetuneError          anything `ft` raises on purpose
      UserError            exit 2: the recipe, the data or the arguments can be mended by the user
      RunError             exit 1: a run failed in a way that is explained (diverged, parity gate, …)
        OutOfMemory        of a training run: it may go on with fewer rows at once
      Interrupted          exit 130: SIGINT or SIGTERM, a checkpoint was saved

`explained` makes one of these of what the machine says (a full disk, a path, memory). Everything else that escapes is a
bug: exit 1, traceback with --debug. `render` is the only place that prints errors, and where they become Chinese;
`visible` is what every text goes through on its way to a terminal.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.language import translated
from finetune.language.agreeing import agreed


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (path, row or line, key), and how to mend it."""

    message: str
    path: str | Path | None = None
    row: int | None = None
    line: int | None = None
    key: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        return self.shown(agreed)

    def shown(self, words: Callable[[str], str]) -> str:
        """One line: `path, row 3: key: message → fix`, in the words of a language."""
        where = [] if self.path is None else [str(self.path)]
        where += [words(f"{name} {at}") for name, at in (("row", self.row), ("line", self.line)) if at is not None]
        parts = [", ".join(where)] if where else []
        parts += [*([] if self.key is None else [self.key]), words(self.message)]
        text = ": ".join(parts) + (f" → {words(self.fix)}" if self.fix else "")
        return text.replace("\n", " ").strip()


class FinetuneError(Exception):
    exit_code = 1

    def lines(self, words: Callable[[str], str] = agreed) -> list[str]:
        return [words(super().__str__())]

    def __str__(self) -> str:
        return agreed(super().__str__())


class UserError(FinetuneError):
    """Bad input. `UserError("message", path=…, row=…, fix=…)` or `UserError([Problem(…), …])`."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Sequence[Problem], /, **where: str | Path | int | None) -> None:
        if isinstance(problems, str):
            problems = [Problem(problems, **where)]  # type: ignore[arg-type]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = list(problems)
        super().__init__("\n".join(self.lines()))

    def lines(self, words: Callable[[str], str] = agreed) -> list[str]:
        return [problem.shown(words) for problem in self.problems]


class RunError(FinetuneError):
    exit_code = 1


class OutOfMemory(RunError):
    """Of a training run. `smaller`: the settings with which it goes on by itself, where it was asked to."""

    def __init__(self, message: str, smaller: dict[str, int] | None = None) -> None:
        self.smaller = smaller
        super().__init__(message)


class Interrupted(FinetuneError):
    """`add`, `drop`: with and without which words the same command line goes on, where it does."""

    exit_code = 130

    def __init__(self, message: str, add: Sequence[str] = (), drop: Sequence[str] = ()) -> None:
        self.add, self.drop = tuple(add), tuple(drop)
        super().__init__(message)


# Tab and newline are left: they move the cursor no farther than the text goes. Bidirectional overrides reorder a line,
# halves of surrogate pairs cannot be encoded.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text with its control characters written out: what rows, paths and answers hold cannot steer the terminal."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


# Names of variables whose values are nobody's to read.
SECRET = re.compile(r"(TOKEN|(API|ACCESS|PRIVATE|SECRET)_?KEY|PASSWORD|PASSWD|SECRET)$", re.I)
# Tokens of the hubs and of GitHub, keys as OpenAI writes them, NAME:PASSWORD or a token in an address.
TOKENS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bms-[0-9a-f]{8}-[0-9a-f-]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[a-z]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|(?<=://)[^/\s@]+(?=@)"
)
SIGNED = re.compile(r"([?&][\w-]*(?:token|key|secret|password|sig|signature|credential)=)[^&\s]+", re.I)


def without_secrets(text: str) -> str:
    """Text of an error in which no token, key or password stands."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value.strip()) > 5:
            text = text.replace(value.strip(), "***")
    return SIGNED.sub(r"\1***", TOKENS.sub("***", text))


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch (inline_container: an archive that could not be written), safetensors and arrow wrap the system's words.
FULL_WORDS = re.compile(r"inline_container|file write failed|No space left|quota exceeded|File too large", re.I)
# Rust libraries (safetensors, tokenizers) end so, torch otherwise, where a file cannot be opened at all.
WRAPPED = re.compile(r'\(os error (\d+)\)(?: at path "([^"]+)")?|inline_container.*strerror: (.+)')
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
MAKE_ROOM = "make room and start again; a run with a checkpoint goes on with --resume"


def unwrapped(error: BaseException) -> BaseException:
    """What the system said when it refused a place, where a library says it in an exception of its own."""
    if isinstance(error, OSError) or not (found := WRAPPED.search(str(error))):
        return error
    number, path, words = found.groups()
    for refused in REFUSED:
        if number == str(refused) or words == os.strerror(refused):
            return OSError(refused, os.strerror(refused), path)
    return error


def explained(error: BaseException) -> FinetuneError | None:
    """What the machine refused, in words; None for a bug."""
    if isinstance(error, MemoryError):
        return RunError("out of memory: use less data at once, or a machine with more")
    if isinstance(error, pickle.UnpicklingError):
        what = "a file holds other things than tensors and numbers, which are never loaded"
        return RunError(f"{what}: use safetensors, or start again with --overwrite where it is a checkpoint")
    if isinstance(error, UnicodeError):
        name = getattr(error, "encoding", None) or "the expected encoding"
        fix = "save it as UTF-8; for pipes and terminals PYTHONIOENCODING=utf-8"
        return UserError(f"text that is not {name}", fix=fix)
    error = unwrapped(error)
    if isinstance(error, OSError) and error.errno is not None and error.errno not in FULL:
        where = error.filename if error.filename is not None else error.filename2
        path = os.fsdecode(where) if isinstance(where, str | bytes | os.PathLike) else None
        fix = "check the path, and who may read and write there"
        if error.errno == errno.EROFS:  # in the middle of a run the system has made it so, after an error of the disk
            fix = "make it writable, or choose another place; a run with a checkpoint goes on with --resume"
        return UserError(os.strerror(error.errno), path=path, fix=fix)
    if isinstance(error, OSError) or FULL_WORDS.search(str(error)):
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        full = FULL_WORDS.search(str(error)) or getattr(error, "errno", None) in FULL
        return RunError(f"a file could not be written ({text}): {MAKE_ROOM}" if full else text)
    return None


LONGEST = 2000  # characters of a line: names of columns or files can be of any length
MOST_LINES = 20  # a broken million-row file must not scroll the cause away


def bounded(line: str) -> str:
    """A line with its middle left out where it is too long: at its ends stand the place and the fix."""
    half = LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} … {line[-half:]}"


def render(error: FinetuneError) -> list[str]:
    """The lines to print on stderr, one per problem, the tail counted instead of shown."""
    lines = [bounded(visible(without_secrets(line))) for line in error.lines(translated)]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], translated(f"… and {len(lines) - MOST_LINES} more problems")]
    return lines
