"""One process in a directory; what is replaced is kept until the new run is finished."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from run_kit import contents, finished, recipe

from finetune.errors import RunError, UserError
from finetune.run import opening
from finetune.run.checkpoints import complete
from finetune.run.directory import ASIDE
from finetune.run.opening import open_run


def attempt(folder: Path, overwrite: bool) -> None:
    """A run that fails before its first checkpoint."""
    with open_run(recipe(folder, seed=7), overwrite=overwrite) as run:
        assert (folder / ASIDE / "adapter" / "x").exists() == overwrite
        run.samples.write_text("new")
        raise RunError("no weights")


def test_two_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    folder = recipe(tmp_path / "run")
    with open_run(folder), pytest.raises(UserError, match="another process"), open_run(folder, overwrite=True):
        pass


def test_an_unfinished_run_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RunError):
        attempt(folder, overwrite=False)
    assert (folder / "samples.jsonl").exists()
    with open_run(recipe(folder), overwrite=True) as run:
        run.finish({"stage": "sft"})
    assert set(contents(folder)) == {"recipe.yaml", "result.json"}


def test_the_old_run_goes_when_the_new_one_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished(folder, adapter__x="old")
    before = contents(folder)
    with pytest.raises(RunError):
        attempt(folder, overwrite=True)
    assert contents(folder) == {**before, ".lock": b""}  # nothing to go on from: as if it had not been tried

    def with_checkpoint(error: bool, **how: bool) -> None:
        with open_run(recipe(folder, seed=7), **how) as run:
            checkpoint = run.checkpoints / "checkpoint-1"
            checkpoint.mkdir(parents=True, exist_ok=True)
            complete(checkpoint)
            if error:
                raise RunError("NaN")
            run.finish({"stage": "sft"})

    for _ in range(2):  # the second replaces an unfinished one: the finished one is still there
        with pytest.raises(RunError):
            with_checkpoint(error=True, overwrite=True)
        assert (folder / ASIDE / "adapter" / "x").read_text() == "old"
        assert not (folder / "adapter").exists()
    with_checkpoint(error=False, resume=True)
    assert not (folder / ASIDE).exists()


def test_the_directory_is_looked_at_again_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes find it empty; the second gets the lock when the first is finished."""

    folder, looked = tmp_path / "run", 0
    original = opening.check_output

    def first_is_faster(*arguments: Any, **more: Any) -> None:
        nonlocal looked
        original(*arguments, **more)
        looked += 1
        if looked == 1:
            finished(folder, adapter__x="first")

    monkeypatch.setattr(opening, "check_output", first_is_faster)
    with pytest.raises(UserError, match="already holds"), open_run(recipe(folder)):
        pass
    assert (folder / "adapter" / "x").read_text() == "first"


class Killed(BaseException):
    """In the place of SIGKILL: nothing of `open_run` runs after it."""


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Whether `work` came to its `count`-th rename or unlink; what cleans up after it does nothing."""
    done = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal done
            done += 1
            if done == count:
                monkeypatch.setattr(opening, "put_back", lambda run: None)
                raise Killed
            return real(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(os, "unlink", counted(os.unlink))
        patch.setattr(opening, "write_json", lambda *_: None)
        try:
            work()
        except Killed:
            return True
        finally:
            monkeypatch.undo()
    return False


def overwritten(folder: Path, said: str = "new") -> None:
    with open_run(recipe(folder), overwrite=True) as run:
        run.adapter.mkdir()
        (run.adapter / "x").write_text(said)
        run.finish({"stage": "sft", "versions": {"ft": "1"}})


def failing(folder: Path) -> None:
    with open_run(recipe(folder), overwrite=True):
        raise RunError("no memory")


def held(folder: Path) -> dict[str, bytes]:
    return {name: what for name, what in contents(folder).items() if name in ("adapter/x", "result.json")}


@pytest.mark.parametrize("work", [overwritten, failing])
def test_a_kill_at_any_moment_of_replacing(
    work: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two runs is whole, here or aside; nothing looks finished that is not; --overwrite goes on."""
    for count in range(1, 100):
        folder = tmp_path / str(count)
        finished(folder, adapter__x="old", samples="old")
        old = held(folder)

        def tried(folder: Path = folder) -> None:
            with suppress(RunError):
                work(folder)

        was_killed = killed_at(count, monkeypatch, tried)
        if (folder / "result.json").exists():
            assert (folder / "adapter" / "x").exists(), "it looks finished"
        with pytest.raises(RunError):  # started again, and fails: what was whole is there again
            failing(folder)
        assert held(folder) == old or held(folder)["adapter/x"] == b"new", f"lost at {count}"
        overwritten(folder, "newest")
        assert (folder / "adapter" / "x").read_text() == "newest"
        assert not (folder / ASIDE).exists()
        if not was_killed:
            break
    assert 3 < count < 99


def test_what_a_finished_run_replaced_is_not_put_back(tmp_path: Path) -> None:
    """A kill after result.json was written, before .replaced/ was gone."""
    folder = tmp_path / "run"
    finished(folder, adapter__x="new")
    (folder / ASIDE / "adapter").mkdir(parents=True)
    for name in ("recipe.yaml", "result.json", "adapter/x"):
        (folder / ASIDE / name).write_text("older")
    with pytest.raises(RunError):
        failing(folder)
    assert (folder / "adapter" / "x").read_text() == "new"
