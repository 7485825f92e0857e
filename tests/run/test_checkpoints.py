"""Which checkpoints are kept, which are found, and what one knows."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from finetune.run.checkpoints import complete, damage, discard, known_of, not_ours, rotate, seal


def checkpoints(folder: Path, *steps: int, half: tuple[int, ...] = ()) -> None:
    for step in (*steps, *half):
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"x")
        if step not in half:
            complete(place, step=step)


def known_of_files(mark: bytes) -> dict[str, list[int | str]]:
    found: dict[str, list[int | str]] = json.loads(mark)["files"]
    return found


def kept(folder: Path) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [
        (2, None, {90, 100}),  # by number, not by name
        (2, 8, {8, 90, 100}),
        (2, 100, {90, 100}),
        (1, 9, {9, 100}),
        (9, None, {8, 9, 90, 100}),
        (2, 95, {90, 100}),  # the best one is half-written, which none can use
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, expected: set[int]) -> None:
    checkpoints(tmp_path, 8, 9, 90, 100, half=(95,))
    rotate(tmp_path, keep, best and f"checkpoint-{best}")
    assert kept(tmp_path) == expected


def test_what_is_no_checkpoint_stays(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1, 2)
    (tmp_path / "checkpoint-mine").mkdir()
    (tmp_path / "checkpoint-0").symlink_to(tmp_path / "checkpoint-2")
    rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-mine", "checkpoint-0"}


def test_a_mark_says_what_it_was_told(tmp_path: Path) -> None:
    checkpoints(tmp_path, 7, half=(8,))
    known = known_of(tmp_path / "checkpoint-7")
    assert known["step"] == 7
    assert list(known["files"]) == ["model.safetensors"]
    assert known_of(tmp_path / "checkpoint-8") == {}
    (tmp_path / "checkpoint-8" / "complete").write_text("[1]")
    assert known_of(tmp_path / "checkpoint-8") == {}


def test_what_a_user_put_beside_or_into_checkpoints_stays(tmp_path: Path) -> None:
    """Copies under names of their own, notes, files: also in a checkpoint that goes, or is half-written."""
    checkpoints(tmp_path, 1, 2, 30, half=(3,))
    mine = ["checkpoint-mine-9/model.safetensors", "checkpoint-007/model.safetensors", "checkpoint-1/notes.txt"]
    mine += ["checkpoint-2 copy/a.txt", "checkpoint-3/sub/converted.gguf", "checkpoint-40", "notes.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    rotate(tmp_path, 1)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        *mine, "checkpoint-30/model.safetensors", "checkpoint-30/complete",
    }  # fmt: skip


def test_what_stayed_is_none_of_a_checkpoint_that_is_written_again(tmp_path: Path) -> None:
    checkpoints(tmp_path, 1)
    place = tmp_path / "checkpoint-1"
    (place / "notes.txt").write_text("mine")
    apart = discard(place)
    (place / "vocab.txt").write_text("y")
    complete(place, apart)
    (place / "notes.txt").write_text("and more")
    assert damage(place) is None
    assert list(known_of(place)["files"]) == ["vocab.txt"]


@pytest.mark.parametrize(
    ("name", "strange"),
    [
        ("checkpoint-1/model.safetensors", False),
        ("checkpoint-1/mine.safetensors", True),  # the mark knows of all that is ours
        ("checkpoint-2/optimizer.pt", False),  # half-written
        ("checkpoint-2/notes.txt", True),
        ("README.md", False),  # of trl
        ("notes.txt", True),
        ("checkpoint-mine/model.safetensors", True),
    ],
)
def test_what_is_not_ours_among_checkpoints(tmp_path: Path, name: str, strange: bool) -> None:
    checkpoints(tmp_path, 1, half=(2,))
    assert not_ours(tmp_path) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert (not_ours(tmp_path) is not None) == strange


def test_a_copy_is_no_later_checkpoint(tmp_path: Path) -> None:
    checkpoints(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-9")
    assert damage(tmp_path / "checkpoint-9") == "it is a copy of checkpoint-2"


def test_a_mark_is_as_it_was_written_or_says_nothing(tmp_path: Path) -> None:
    """Wherever a byte of it is changed."""
    checkpoints(tmp_path, 7)
    mark = tmp_path / "checkpoint-7" / "complete"
    data = mark.read_bytes()
    for place in range(len(data)):
        mark.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert known_of(mark.parent) in ({}, {"name": "checkpoint-7", "files": known_of_files(data), "step": 7}), place
    seal(mark.parent, {"numbers": [float("nan"), 1e-300, 0.1], "name": "ü"})
    assert known_of(mark.parent) == {"numbers": [None, 1e-300, 0.1], "name": "ü"}


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(tmp_path, 7)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("finetune.run.checkpoints._sum", broken)
    assert damage(tmp_path / "checkpoint-7") == "model.safetensors cannot be read: Input/output error"
