"""`ft chat` with piped input: one answer a line, history, /reset, /exit."""

from __future__ import annotations

import _thread
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft

from finetune.commands import chat
from finetune.data.chat import make_encoder
from finetune.errors import RunError
from finetune.evaluation.generation import GREEDY
from finetune.models import loading, tokenizers
from finetune.recipe.sections import ModelConfig


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


def asked(base: Path) -> tuple[Any, Any, list[int]]:
    config = ModelConfig(name=str(base))
    encoder = make_encoder(tokenizers.load_tokenizer(config))
    return loading.load_model(config, torch.float32), encoder, encoder.prompt_ids([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("after", [0, 3])
def test_a_failing_model_is_told_and_not_waited_for(base: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    model, encoder, prompt = asked(base)
    threads, calls = threading.active_count(), []
    real = model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise IndexError("index out of range in self\nand more")
        return real(*arguments, **options)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(RunError, match="IndexError: index out of range in self; a shorter conversation"):
        chat.reply(model, encoder, prompt, GREEDY, 20)
    assert threading.active_count() == threads


def test_a_failing_model_in_both_kinds_of_session(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Piped: the error ends it. At a terminal: the turn is forgotten, and the conversation goes on."""
    seen: list[list[int]] = []

    def fail_on_the_second(model: Any, ids: torch.Tensor, *_: Any, streamer: Any, **__: Any) -> None:
        seen.append(ids[0].tolist())
        if len(seen) == 2:
            raise ValueError("too long")
        streamer.put(ids)
        streamer.put(torch.tensor([70 + len(seen)]))
        streamer.end()

    monkeypatch.setattr(chat, "answer", fail_on_the_second)
    for interactive in (False, True):
        seen.clear()
        lines = iter(["one", "two", "three", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))  # noqa: B023
        monkeypatch.setattr("sys.stdin.isatty", lambda: interactive, raising=False)  # noqa: B023
        if not interactive:
            with pytest.raises(RunError, match="too long"):
                chat.run(model=str(base), max_new_tokens=4)
            continue
        chat.run(model=str(base), max_new_tokens=4)
        assert "too long" in " ".join(capsys.readouterr().err.split())
        assert len(seen[2]) < len(seen[1]) + 10, "the failed turn is not in the third prompt"


def test_interrupting_ends_the_answer_only(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoder, prompt = asked(base)
    real, threads, calls = model.forward, threading.active_count(), []

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            _thread.interrupt_main()
        return real(*arguments, **options)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(chat, "stop_ids", lambda *_: [])
    chat.reply(model, encoder, prompt, GREEDY, 100_000)
    assert 4 <= len(calls) < 2000
    assert threading.active_count() == threads


def test_greedy_is_greedy(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "eos_token_id": 2}))
    said = []
    for folder in (base, other):
        lines = iter(["hello", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))  # noqa: B023
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        chat.run(model=str(folder), max_new_tokens=12)
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out
    assert "repetition_penalty 5.0" in said[1].err
