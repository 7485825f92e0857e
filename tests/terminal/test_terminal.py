"""What reaches the terminal, and what the machine refuses: text, one clear line, and never "a bug"."""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from rich.console import Console
from rich.table import Table

from finetune.errors import Problem, RunError, UserError, explained, render, visible
from finetune.terminal import progress

EVIL = "\x1b[31mred\x9b2J\r\x07\x7f\u202eoff\u2066"
SHOWN = "\\x1b[31mred\\x9b2J\\r\\x07\\x7f\\u202eoff\\u2066"


def test_control_characters_are_shown() -> None:
    assert visible(EVIL) == SHOWN
    kept = "tab\there\nline 看 é 👩‍👩‍👧 [bold] :smile: שלום‏"
    assert visible(kept) == kept
    error = UserError([Problem(EVIL, path=EVIL, key=EVIL, fix=EVIL)])
    assert render(error) == [f"{SHOWN}: {SHOWN}: {SHOWN} → {SHOWN}"]
    assert render(RunError(EVIL)) == [SHOWN]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal in colour, for stderr and stdout."""
    file = io.StringIO()
    for name in ("console", "output"):
        monkeypatch.setattr(progress, name, Console(file=file, width=200, **progress.PLAIN))
    return file


def test_paths_are_no_markup(screen: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither rich's tags nor its emoji names, wherever text comes out."""
    name = "runs/[bold]a[/bold]:warning::smile:[x]"
    table = Table(title=name)
    table.add_column(name)
    progress.row(table, f"{name}{EVIL}")
    progress.show(table)
    progress.note(name + EVIL)
    progress.warn(name)
    progress.samples(name, [(name, name + EVIL, 1.0)])
    progress.say(name + EVIL)
    out = screen.getvalue() + capsys.readouterr().out
    assert out.count(name) == 9
    assert out.count(SHOWN) == 4
    assert not set(EVIL) & set("\x1b\x9b\r\x07\x7f\u202e") & set(out)


def test_json_stays_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"text": f"{EVIL} 看 é 😀 \ud800"}
    for encoding in ("utf-8", "ascii", "cp936", "latin-1"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        progress.say_json(value)
        sys.stdout.flush()
        text = raw.getvalue().decode(encoding)
        assert json.loads(text) == value
        assert "\x9b" not in text
        assert ("看" in text) == (encoding == "utf-8")


def test_terminals_that_know_fewer_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("ascii", "a -> b... \\u770b\\U0001f600"), ("cp936", "a → b… 看\\U0001f600")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        progress.settle_streams()
        print("a → b… 看😀")
        sys.stdout.flush()
        assert raw.getvalue().decode(encoding).strip() == expected


def test_commands_can_be_typed() -> None:
    parts = ["eval", "my runs/$(rm a)/it's", "--set", "reward.model=a b"]
    assert shlex.split(progress.command(*parts)) == ["ft", *parts]


def test_what_the_machine_refuses_is_no_bug() -> None:
    full = [
        OSError(28, "No space left on device"), OSError(27, "File too large", "x"), OSError(122, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 320 vs 214"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ]  # fmt: skip
    for error in full:
        found = explained(error)
        assert found is not None
        assert found.exit_code == 1
        assert "could not be written" in str(found)
    for error in (PermissionError(13, "Permission denied", "/x/y"), OSError(30, "Read-only file system", b"/x/y")):
        found = explained(error)
        assert isinstance(found, UserError)
        assert found.problems[0].path == "/x/y"
    assert isinstance(explained(MemoryError()), RunError)
    assert isinstance(explained(UnicodeDecodeError("ascii", b"\xff", 0, 1, "x")), UserError)
    wrapped = {
        ValueError('Error while serializing: I/O error: Read-only file system (os error 30) at path "/x/y"'): "/x/y",
        Exception("Permission denied (os error 13)"): None,  # tokenizers' own kind
        RuntimeError(
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: Permission denied"
        ): None,
    }
    for error, path in wrapped.items():
        found = explained(error)
        assert isinstance(found, UserError), error
        assert found.problems[0].path == path
        assert found.problems[0].message in ("Read-only file system", "Permission denied")
    for error in (KeyError("a"), ValueError("b"), RuntimeError("c"), AssertionError()):
        assert explained(error) is None


def ft(*arguments: Any, env: dict[str, str] | None = None, **how: Any) -> subprocess.CompletedProcess[bytes]:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return subprocess.run(command, check=False, env={**os.environ, "COLUMNS": "200", **(env or {})}, **how)


def test_a_full_disk_at_the_end_of_a_pipe() -> None:
    with Path("/dev/full").open("wb") as full:
        done = ft("recipes", "list", stdout=full)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("both", [False, True])
def test_a_pipe_that_nobody_reads_on(tmp_path: Path, both: bool) -> None:
    """`| head` has what it wanted; with `2>&1 | head` what was cut off is not called done."""
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}] * 4)
    reader, writer = os.pipe()
    os.close(reader)
    how: dict[str, Any] = {"stdout": writer, "stderr": writer if both else subprocess.PIPE}
    done = ft("data", "preview", "--data", data, "--model", "tiny-llama", **how)
    os.close(writer)
    assert done.returncode == both
    assert not done.stderr


def test_wrong_arguments_are_shown_escaped() -> None:
    done = ft("recipes", "--\x1b[31mred")
    assert done.returncode == 2
    assert b"--\\x1b[31mred" in done.stderr
    assert b"\x1b" not in done.stderr


def test_a_console_that_is_ascii(tmp_path: Path) -> None:
    """Rows, paths and recipes in Chinese, with escape sequences in the rows."""
    rows = [{"question": f"问{i}{EVIL}", "answer": f"答{i}😀"} for i in range(3)]
    data = write_rows(tmp_path / "数据[red]:smile: b.jsonl", [*rows, {"question": EVIL}])
    words = ["ft", "data", "preview", "--data", str(data), "--model", "tiny-llama"]
    code = (
        "import json, sys; from finetune.cli import main\n"
        "for sys.argv in json.loads(sys.argv[1]):\n"
        "    try: main()\n"
        "    except SystemExit as ended: print(f'<end {ended.code}>', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([words, [*words, "--json", "-"]])], capture_output=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert b"\x1b" not in done.stdout + done.stderr
    shown, as_json, rest = done.stdout.split(b"<end 0>\n")
    assert rest == b"", done.stderr
    assert b"[red]:smile: b.jsonl" in shown
    assert SHOWN.encode() in shown
    assert "答0" in json.loads(as_json)["samples"][0]["text"]


def test_a_disk_that_fills_while_training(recipe: Any, tmp_path: Path) -> None:
    """A file that cannot be finished, with nowhere to keep caches: one line, exit 1, and nothing that looks done."""
    path = recipe(train={"save_steps": 2})
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}
    done = ft("sft", "--recipe", path, preexec_fn=limit, env=nowhere)
    said = done.stderr.decode()
    assert done.returncode == 1, said
    assert "could not be written" in said
    assert "bug" not in said
    assert "matplotlib" not in said
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").rglob("complete"))


def test_output_files_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model or data is looked for: neither is there."""
    from finetune.commands import data, evaluate, recipes

    monkeypatch.chdir(tmp_path)
    mine = write_rows(tmp_path / "mine.jsonl", [{"text": "mine"}])
    for file, message in {"nowhere/x": "no such folder", str(mine): "nothing that ft wrote", ".": "is no file"}.items():
        with pytest.raises(UserError, match=f"--json: .*{message}"):
            evaluate.run(["no-run"], json_file=file)
        with pytest.raises(UserError, match=f"--json: .*{message}"):
            data.check(data="no-data", json_file=file)
        with pytest.raises(UserError, match=f"--json: .*{message}"):
            data.preview(data="no-data", model="no-model", json_file=file)
        with pytest.raises(UserError, match=f"--html: .*{message}"):
            data.preview(data="no-data", model="no-model", html_file=file)
    with pytest.raises(UserError, match="this file exists"):
        data.check(data="no-data", fix=str(mine))
    with pytest.raises(UserError, match="is the file of --fix"):
        data.check(data="no-data", fix="a.jsonl", json_file="a.rejects.jsonl")
    with pytest.raises(UserError, match="no such folder"):
        recipes.new("nowhere/r.yaml", stage="sft", data="d")
    (tmp_path / recipes.SCHEMA_FILE).write_text("mine")
    (tmp_path / "lost.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    for name in ("r.yaml", "lost.yaml"):
        with pytest.raises(UserError):
            recipes.new(name, stage="sft", data="d")
    assert mine.read_text() == '{"text": "mine"}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ft-recipe.schema.json", "lost.yaml", "mine.jsonl"]
