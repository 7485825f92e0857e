"""`ft chat` with piped input: one answer a line, history, /reset, /exit."""

from __future__ import annotations

from pathlib import Path

from conftest import ft


def test_piped(base: Path, tmp_path: Path) -> None:
    lines = ["hello", "hello", "/reset", "hello", "/exit", "never answered"]
    done = ft("chat", "--model", base, "--max-new-tokens", "6", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 3
    assert answers[2] == answers[0], "/reset forgets the conversation"
    assert answers[1] != answers[0], "the second turn sees the first"


def test_end_of_input_ends_the_conversation(base: Path) -> None:
    assert ft("chat", "--model", base, "--max-new-tokens", "2", stdin="").returncode == 0


def test_no_model() -> None:
    done = ft("chat")
    assert done.returncode == 2
    assert "give --model" in done.stderr
