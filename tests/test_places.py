"""Where results go: nothing foreign is replaced, nothing is written through a link, nothing appears half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune import places
from finetune.errors import UserError
from finetune.places import built_beside, check_file, check_folder, json_with
from finetune.run.writing import write_atomically, write_json


def test_no_place_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, home = tmp_path / "work" / "here", tmp_path / "home"
    for folder in (work, home):
        folder.mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    places_ = ["/", "/.", "..", "../..", str(home), "~", str(tmp_path / "file"), str(tmp_path / "file" / "run"), "a\0b"]
    for text in (*places_, str(tmp_path / "link"), str(tmp_path / "lost")):
        with pytest.raises(UserError) as caught:
            check_folder(Path(text).expanduser(), "output.dir")
        assert caught.value.problems[0].key == "output.dir", text
    check_folder(Path("."), "output.dir")
    with pytest.raises(UserError, match="other things"):
        check_folder(Path("."), "--output", here=False)
    check_folder(tmp_path / "new" / "run", "output.dir")
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="other things"):
        check_folder(Path("/"), "output.dir")


def test_read_only_places_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # for root every place is writable
    for check in (
        lambda: check_folder(tmp_path / "a" / "b", "output.dir"),
        lambda: check_file(tmp_path / "x", "k", bool),
    ):
        with pytest.raises(UserError, match="cannot be written to"):
            check()


def test_output_files(tmp_path: Path) -> None:
    ours = json_with("runs", "comparisons")
    (tmp_path / "ours.json").write_text(json.dumps({"runs": [], "comparisons": [], "data": ""}))
    (tmp_path / "empty.json").touch()
    for name in ("ours.json", "empty.json", "new.json"):
        check_file(tmp_path / name, "--json", ours)
    (tmp_path / "mine.json").write_text('{"runs": []}')
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "link.json").symlink_to(tmp_path / "ours.json")
    (tmp_path / "lost.json").symlink_to(tmp_path / "nowhere.json")
    wrong = {
        "mine.json": "nothing that ft wrote", "rows.jsonl": "nothing that ft wrote", "link.json": "is a link",
        "lost.json": "is a link", "nowhere/new.json": "no such folder", "mine.json/new.json": "no such folder",
        "": "is no file",
    }  # fmt: skip
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            check_file(tmp_path / name, "--json", ours)
    with pytest.raises(UserError, match="is no file"):
        check_file(Path("/dev/null"), "--json", ours)


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    """Not through one at the file, nor at any name beside it."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("x.json", "x.json.part", f"x.json.{os.getpid()}.part"):
        (out / name).symlink_to(mine)
    (out / "y.json.part").write_text("mine, too")
    write_json(out / "x.json", {"a": 1})
    write_json(out / "y.json", {"a": "\ud800"})
    assert mine.read_text() == "mine"
    assert (out / "y.json.part").read_text() == "mine, too"
    assert json.loads((out / "x.json").read_text()) == {"a": 1}
    assert json.loads((out / "y.json").read_text()) == {"a": "\ud800"}


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "before"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def build(target: Path, *files: str, going: tuple[str, ...] = ()) -> None:
    with built_beside(target, "--output", lambda: going) as part:
        assert names(part) == [places.UNFINISHED]
        for file in files:
            (part / file).write_text("new")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "merged"
    build(target, "a", "b")
    assert names(target) == ["a", "b"]
    (target / "mine.gguf").write_text("mine")
    build(target, "a", "c", going=("a", "b"))
    assert names(target) == ["a", "c", "mine.gguf"]
    assert (target / "mine.gguf").read_text() == "mine"
    assert names(tmp_path / "deep") == ["merged"]


def test_the_old_folder_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    build(target, "a")
    (target / "a").write_text("old")
    (target / "b").write_text("mine")

    def unproven() -> None:
        with built_beside(target, "--output", lambda: ("a",)) as part:
            (part / "a").write_text("new")
            assert (target / "a").read_text() == "old"
            raise RuntimeError("not proven")

    with pytest.raises(RuntimeError, match="not proven"):
        unproven()
    with pytest.raises(UserError, match="under names that it needs now"):
        build(target, "a", "b", going=("a",))
    assert [names(tmp_path), names(target), (target / "b").read_text()] == [["merged"], ["a", "b"], "mine"]
    assert (target / "a").read_text() == "old"


def test_only_an_unfinished_folder_of_ours_is_built_in(tmp_path: Path) -> None:
    target, part = tmp_path / "merged", tmp_path / "merged.part"
    part.mkdir()
    (part / "mine").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        build(target, "a")
    assert (part / "mine").read_text() == "mine"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is in the way"):
        build(target, "a")
    assert names(tmp_path / "elsewhere") == ["mine"]
    part.unlink()
    part.mkdir()  # as a kill leaves it
    for name in (places.UNFINISHED, "half.safetensors"):
        (part / name).touch()
    build(target, "a")
    assert names(target) == ["a"]


def test_two_processes_do_not_build_the_same_folder(tmp_path: Path) -> None:
    target = tmp_path / "merged"
    with built_beside(target, "--output", tuple) as part:
        (part / "a").touch()
        with pytest.raises(UserError, match="another process"):
            build(target, "b")
    assert names(target) == ["a"]


def test_what_a_link_leads_to_is_left_alone(tmp_path: Path) -> None:
    """It is not read as ours, not built in, not given another mode, and not taken with the link."""
    outside, ours = tmp_path / "outside", tmp_path / "ours"
    outside.mkdir()
    ours.mkdir()
    (outside / "result.json").write_text('{"a": 1}')
    (outside / "result.json").chmod(0o600)
    (ours / "result.json").symlink_to(outside / "result.json")
    assert places.read_json(ours / "result.json") == {}
    places.as_umask(ours)
    assert (outside / "result.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.part").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="in the way"):
        places.check_part(tmp_path / "x", "--output")
    (tmp_path / "link").symlink_to(outside)
    places.remove(tmp_path / "link")
    assert (outside / "result.json").exists()


def test_what_another_process_builds_there_meanwhile_stays(tmp_path: Path) -> None:
    """Ours has its name already, and theirs stands where it was built."""
    with places.unfinished(tmp_path / "model", "--output") as part:
        part.rename(tmp_path / "model")
        part.mkdir()
        (part / "theirs").write_text("theirs")
    assert (part / "theirs").read_text() == "theirs"


def test_what_a_link_leads_to_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waited for, as a pipe would be, nor opened, which may change what it leads to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path / "nowhere")
    synced: list[Path] = []
    monkeypatch.setattr(places, "sync", synced.append)
    places.sync_tree(folder)
    assert synced == [folder / "file", folder, tmp_path]


def test_a_name_that_is_taken_after_all_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "taken").symlink_to(tmp_path / "mine")
    monkeypatch.setattr(places, "fresh", lambda path: tmp_path / "taken")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "merged"
    build(target, "a")
    (target / "a").write_text("old")
    rename = Path.rename

    def refused(path: Path, to: Path) -> Path:
        if path.name == "merged.part":
            raise PermissionError(13, "Permission denied")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        build(target, "a", going=("a",))
    assert [names(tmp_path), (target / "a").read_text()] == [["merged"], "old"]


def test_a_report_of_others_is_none_of_ours() -> None:
    for versions in ("software", ["ft"], None, {"torch": "2"}):
        assert not places.made_by_ft({"versions": versions}), versions
    assert places.made_by_ft({"versions": {"ft": "0"}})


def test_a_folder_below_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: output\.dir: is no folder"):
        check_folder(tmp_path / "file" / "a" / "run", "output.dir")
    with pytest.raises(UserError, match=r"file: output\.dir: is a file"):
        check_folder(tmp_path / "file", "output.dir")


def test_json_that_is_no_object_is_none_of_ours(tmp_path: Path) -> None:
    for text in ("[1]", "null", '"x"', "{"):
        (tmp_path / "result.json").write_text(text)
        assert places.read_json(tmp_path / "result.json") == {}
