"""Which checkpoints are kept, which are found, and what one knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.run.checkpoints import complete, known_of, rotate


def checkpoints(folder: Path, *steps: int, half: tuple[int, ...] = ()) -> None:
    for step in (*steps, *half):
        place = folder / f"checkpoint-{step}"
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"x")
        if step not in half:
            complete(place, step=step)


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
