"""`open_run`: the directory is checked, locked and written to, and what it replaces is kept until the run is finished.

A lock keeps two processes out of one directory. --overwrite takes only what a run of ours wrote, known by its
recipe.yaml, and keeps it in .replaced/ until the new run is finished.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout

from finetune import places, ranks
from finetune.errors import Interrupted, UserError, without_secrets
from finetune.recipe.file import to_yaml
from finetune.recipe.stages import Recipe
from finetune.run.directory import ASIDE, CONTENTS, LOCK, MARK, Run, resumable, versions
from finetune.run.guards import check_inputs, check_output
from finetune.run.resuming import goes_further, to_go_on
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import warn


@contextmanager
def open_run(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Iterator[Run]:
    """Create the directory, lock it, write recipe.yaml. Call after everything that can be checked has been checked.

    What is replaced waits in .replaced/: it goes when the new run is finished, and is put back when that fails before
    it has anything to go on from.
    """
    run = Run.of(recipe)
    if not ranks.first():
        yield joined_run(run)
        return
    if overwrite:
        check_inputs(recipe)
    further = resume and goes_further(recipe)
    check_output(run.path, overwrite, resume, further=further)
    made = not run.path.exists()
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.path / LOCK, blocking=False).acquire()
    except Timeout:
        raise UserError("another process is writing here", path=run.path, fix="wait, or use --output DIR") from None
    with lock:
        check_output(run.path, overwrite, resume, further=further)  # another process may have been here meanwhile
        aside = run.path / ASIDE
        try:
            if resume:  # before anything is touched: when none can be read, all stays as it is
                run.start = run.usable_checkpoint()
            if aside.is_dir():
                settle(run)
            if overwrite:
                set_aside(run)
            elif further and run.result.exists():  # from now on it is not finished
                aside.mkdir(exist_ok=True)
                run.result.replace(aside / run.result.name)
            # Also when it goes on: what it reads may lie elsewhere now.
            header = f"# ft {recipe.stage} --recipe recipe.yaml\n{MARK}\n"
            write_atomically(run.path / "recipe.yaml", to_yaml(recipe, header))
            run.error.unlink(missing_ok=True)
            ranks.barrier()
            yield run
        except BaseException as error:
            if not isinstance(error, UserError | Interrupted | KeyboardInterrupt | SystemExit):
                with suppress(OSError):  # the disk may be full
                    write_json(
                        run.error,
                        {"error": without_secrets(f"{type(error).__name__}: {error}"), "versions": versions()},
                    )
            if aside.is_dir() and not resumable(run):
                put_back(run)
            elif aside.is_dir():
                warn(f"what this run replaces is in {aside} until it is finished")
            if made and isinstance(error, UserError) and not resumable(run):
                places.remove(run.path)  # refused: nothing was written
            if isinstance(error, KeyboardInterrupt) and resumable(run):
                raise Interrupted(f"interrupted; go on with {to_go_on(recipe)}") from None
            raise
        if aside.is_dir() and run.result.exists():
            places.remove(aside)
        (run.path / LOCK).unlink(missing_ok=True)


def joined_run(run: Run) -> Run:
    """For the processes beside the first: when that has opened it. UserError where they do not see what it wrote."""
    ranks.barrier()
    if not (run.path / "recipe.yaml").is_file():
        fix = "put output.dir on a disk that all machines share"
        raise UserError("is not what the first process writes to", path=run.path, key="output.dir", fix=fix)
    return run


def settle(run: Run) -> None:
    """What a kill left in .replaced/: beside a finished run it goes, and of a run that was only half there, the rest
    comes back; the result stays, as what was begun is to replace it."""
    aside = run.path / ASIDE
    if run.result.exists():
        places.remove(aside)
    elif not (aside / "recipe.yaml").exists():
        for path in aside.iterdir():
            if path.name != run.result.name and not os.path.lexists(run.path / path.name):
                path.rename(run.path / path.name)


def in_order(names: Iterable[str]) -> list[str]:
    """result.json first: nothing looks finished that is not; recipe.yaml last: it says whose the others are."""
    return sorted(names, key=lambda name: (name == "recipe.yaml") - (name == "result.json"))


def set_aside(run: Run) -> None:
    """What is there to .replaced/, which is complete with its recipe.yaml: then what never replaced that run goes."""
    aside = run.path / ASIDE
    complete = (aside / "recipe.yaml").exists()
    for name in in_order(CONTENTS):
        path = run.path / name
        if complete:
            places.remove(path)
        elif path.exists():
            aside.mkdir(exist_ok=True)
            path.rename(aside / name)


def put_back(run: Run) -> None:
    aside = run.path / ASIDE
    complete = (aside / "recipe.yaml").exists()
    for name in in_order(CONTENTS):
        if complete or (aside / name).exists():
            places.remove(run.path / name)
    for name in reversed(in_order(path.name for path in aside.iterdir())):
        (aside / name).rename(run.path / name)
    aside.rmdir()
