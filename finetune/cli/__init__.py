"""`ft`: the command line. `main` runs a command and shows its errors; what can be typed is listed in `commands`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import traceback
from pathlib import Path
from typing import NoReturn, TextIO

import typer

from finetune import __version__, language, ranks
from finetune.child import PART, as_interrupts
from finetune.cli import completion, shared
from finetune.cli.commands import TRAINING, app
from finetune.errors import FinetuneError, Interrupted, UserError, explained, render, visible, without_secrets
from finetune.resources import resource_path

OTHER_COMMANDS = {
    **dict.fromkeys(("train", "finetune"), "ft sft, ft pretrain, ft reward, ft dpo, ft kto or ft ppo"),
    "rlhf": "ft dpo, ft kto, ft reward or ft ppo",
    "rm": "ft reward",
    **dict.fromkeys(("api", "server"), "ft serve"),
    "evaluate": "ft eval",
    **dict.fromkeys(("infer", "inference"), "ft chat, or ft generate for a file"),
    "predict": "ft generate",
    "preprocess": "ft data check, or ft data preview",
    "env": "ft doctor",
    "version": "ft --version",
}
"""What other tools call it -> the command here."""


def main() -> None:
    """Entry point: one renderer for errors, the exit codes of the contract."""
    if completion.ASKED in os.environ:  # by the shell, at the Tab key
        completion.answer(app)
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", "--verbose")]
    part = arguments[:1] == [PART]
    arguments = arguments[part:]
    shared.VERBOSE, debug = "--verbose" in sys.argv, "--debug" in sys.argv
    if arguments == ["--version"]:
        print(f"ft {__version__}")
        return
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    from finetune.terminal import progress

    progress.settle_streams()
    progress.advising = not part
    try:
        if arguments and arguments[0] in OTHER_COMMANDS:
            raise UserError(f"no command {arguments[0]!r}", fix=OTHER_COMMANDS[arguments[0]])
        if arguments and arguments[0].lower().endswith((".yaml", ".yml")):
            command = progress.command(stage_of(arguments[0]), *arguments)
            raise UserError(f"no command {arguments[0]!r}: it is a recipe", fix=command)
        with as_interrupts():
            check_given(arguments)
            check_processes(arguments)
            run = app
            if language.chinese():
                from finetune.cli.chinese import in_chinese  # with rich, which the Tab key need not wait for

                run = in_chinese(app)
            code = run(args=arguments, prog_name="ft", standalone_mode=False) or 0
        if code == 130:  # typer makes this of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()  # or a full disk is told too late for a line and an exit code of its own
        sys.exit(code)
    except FinetuneError as error:
        if not ranks.heard(error):
            sys.exit(error.exit_code)
        if debug:
            _print_traceback()
        if isinstance(error, Interrupted) and error.add:
            words = [word for word in arguments if word not in (*error.add, *error.drop)]
            error = Interrupted(f"{error}; go on with {progress.command(*without_key(words), *error.add)}")
        if not (part and error.exit_code == 130):
            _print_errors(render(error), "yellow" if error.exit_code == 130 else "red")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # typer takes every EOFError for Ctrl-D
            if debug:
                _print_traceback()
            _print_bug(error.__cause__)
            sys.exit(1)
        if not part:
            launched = [] if "--launch" in arguments else ranks.words()
            again = progress.command(*without_key(arguments), *launched)
            _print_errors([f"interrupted; start again with {again}"], "yellow")
        sys.exit(130)
    except BrokenPipeError as error:
        sys.exit(_unread(error))
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # typer makes 1 of it
            sys.exit(_unread(ended.__context__))
        raise
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong arguments, in typer's own words
            said = io.StringIO()
            error.show(file=said)
            lines = visible(without_secrets(said.getvalue())).splitlines(keepends=True)
            print("".join(language.translated(line[:-1]) + line[-1] for line in lines), end="", file=sys.stderr)
            sys.exit(error.exit_code)
        if debug:
            _print_traceback()
        ranks.heard(error)
        if (known := explained(error)) is not None:
            _print_errors(render(known), "red")
            _close(sys.stdout)
            sys.exit(known.exit_code)
        _print_bug(error)
        sys.exit(1)


def stage_of(recipe: str) -> str:
    """The command that a recipe is for, as far as its lines say so."""
    for path in (Path(recipe), resource_path("recipes", recipe)):
        with contextlib.suppress(OSError, ValueError):
            if not path.is_file():  # a pipe would be waited for
                continue
            if found := re.search(r"^stage: *(\w+)", path.read_text("utf-8", errors="replace"), re.MULTILINE):
                return found[1]
    return "sft"


def check_given(arguments: list[str]) -> None:
    """UserError for an argument that is empty (as a path it would be the working directory), and for FT_LANG."""
    if (given := language.unknown()) is not None:
        fix = f"one of {', '.join(language.LANGUAGES)}, or unset it"
        raise UserError(f"unknown language {given!r}", key=language.VARIABLE, fix=fix)
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if not argument and before != "--system":
            key = before if before.startswith("--") else None
            fix = "is a variable of the shell not set? Leave it out otherwise"
            raise UserError("an argument is empty", key=key, fix=fix)


def check_processes(arguments: list[str]) -> None:
    """UserError for a command that several processes would do several times."""
    alone = bool(arguments) and arguments[0] not in TRAINING
    if alone and any(word.partition("=")[0] == "--launch" for word in arguments):
        what = f"ft {arguments[0]} works in one process"
        raise UserError(what, key="--launch", fix=f"leave it out; several train: {', '.join(TRAINING)}")
    if ranks.count() > 1 and alone and "RANK" in os.environ:
        what = f"ft {arguments[0]} works in one process, and this is one of {ranks.count()}"
        raise UserError(what, key="WORLD_SIZE", fix=f"start it by itself; several train: {', '.join(TRAINING)}")
    if ranks.count() == 1 or alone:
        ranks.forget()


def without_key(arguments: list[str]) -> list[str]:
    """The same line without the key that stands in it; it can come from FT_API_KEY as well."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, _ = argument.partition("=")
        hidden = before == "--api-key" or (name == "--api-key" and equals)
        found.append(f"{name}=KEY" if hidden and equals and name == "--api-key" else "KEY" if hidden else argument)
    return found


def _print_traceback() -> NoReturn:
    print(visible(without_secrets(traceback.format_exc())), end="", file=sys.stderr)
    sys.exit(1)


def _print_bug(error: BaseException) -> None:
    _print_errors(
        [without_secrets(f"{type(error).__name__}: {error}"), "this is a bug; --debug shows the traceback"], "red"
    )


def _print_errors(lines: list[str], style: str) -> None:
    from finetune.terminal.progress import note

    for line in lines:
        note(ranks.name() + line, style)


def _unread(error: BrokenPipeError) -> int:
    """The exit code where nobody reads on: 0 of `| head`, which has what it wanted; 1 where no word can be said."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream.fileno())]
    for stream in gone:
        _close(stream)
    if not gone:
        _print_bug(error)
    return 0 if gone == [sys.stdout] else 1


def _close(stream: TextIO) -> None:
    """What is left to print has nowhere to go: without this Python tries again at its end, and complains."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0))
