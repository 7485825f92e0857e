"""`ft chat` from a pipe: a message a line, history, commands; several adapters and the base on one load."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train, write_rows

from finetune.commands import chat, generate
from finetune.commands.chat import screen
from finetune.data.thinking import Thinking
from finetune.errors import RunError, visible
from finetune.evaluation import streaming
from finetune.evaluation.generation import GREEDY
from finetune.evaluation.streaming import Parts, stream
from finetune.evaluation.targets import model_target
from finetune.evaluation.writers import load, writer_of

SHORT = ("--max-new-tokens", "6")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def piped(*arguments: Any, said: list[str]) -> Any:
    return ft("chat", *arguments, *SHORT, stdin="\n".join(said))


def test_piped(base: Path) -> None:
    done = piped("--model", base, said=["\ufeffhello\r", "hello", "", "/reset", "hello", "/exit", "never answered"])
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 3
    assert answers[2] == answers[0], "/reset forgets the conversation"
    assert answers[1] != answers[0], "the second turn sees the first"


def test_end_of_input_ends_the_conversation(base: Path) -> None:
    assert piped(base, said=[]).returncode == 0


def test_no_model() -> None:
    done = ft("chat")
    assert done.returncode == 2
    assert "give --model" in done.stderr


def test_undo_and_texts_of_several_lines(base: Path, tmp_path: Path) -> None:
    """What is saved is what was said: blocks, lines that go on, slashes, and nothing of what was taken back."""
    file = tmp_path / "a conversation.jsonl"
    said = [
        "/system Be short.", "wrong", "/undo", '"""', "/reset", "", '  two" """', "a \\", "b", "//etc/hosts",
        "C:\\\\", f"/save {file}", "/help", f'/save "{tmp_path}/again.jsonl"',
    ]  # fmt: skip
    done = piped(base, said=said)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    [row] = lines(file)
    assert [turn["content"] for turn in row["messages"] if turn["role"] != "assistant"] == [
        "Be short.", '/reset\n\n  two" ', "a \nb", "/etc/hosts", "C:\\\\",
    ]  # fmt: skip
    assert [turn.get("train") for turn in row["messages"] if turn["role"] == "assistant"] == [False] * 4, "all are cut"
    assert "4 of 4 answers are not whole" in done.stderr
    assert lines(tmp_path / "again.jsonl") == [row]


def test_what_was_saved_is_trained_on(
    base: Path, tmp_path: Path, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "said.jsonl"
    real = streaming.answer

    def ended(model: Any, ids: torch.Tensor, *more: Any, streamer: Any, **options: Any) -> Any:
        made = real(model, ids, *more, streamer=streamer, **options)
        streamer.put(torch.tensor([2]))
        return made

    monkeypatch.setattr(streaming, "answer", ended)
    done = piped(base, said=["one", "two", f"/save {file}"])
    assert done.returncode == 0, done.stderr
    [row] = lines(file)
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * 2
    assert not any("train" in turn for turn in row["messages"])
    run = train(recipe(data={"train": str(file)}, train={"effective_batch_size": 1, "max_steps": 1}))
    assert json.loads((run.path / "result.json").read_text())["trained_tokens"] > 10


def test_what_cannot_be_done_ends_a_pipe(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, exit code 2, never sent to the model, and nothing is overwritten."""
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    never: list[Any] = []
    made = chat.made
    monkeypatch.setattr(chat, "load", lambda writers: None)
    monkeypatch.setattr(chat, "beside", lambda talk: None)

    def made_silent(*arguments: Any) -> Any:
        talk = made(*arguments)
        talk.ask = never.append
        return talk

    monkeypatch.setattr(chat, "made", made_silent)
    for typed, said in {
        "/rest": "no command /rest → did you mean /reset?",
        "/usr/bin": "no command /usr/bin → /help lists them (// begins a message that begins with a slash)",
        "/": "no command / ",
        "/undo": "/undo: nothing was said yet",
        "/undo 2": "/undo: takes no text, and there is '2'",
        "/save": "/save: names no file",
        f"/save {tmp_path}/new.jsonl": "/save: nothing was said yet",
        "/save a.csv": "a.csv: /save: would not be read as JSON lines",
        "/adapter": "/adapter: no adapter is loaded",
        "/adapter b": "/adapter: no adapter 'b' is loaded",
        "/params top_p": "/params: top_p has no value",
        "/params top_p 0.5": "/params top_p: has no effect: answers are greedy",
        "/params temperature -1": "/params temperature: Input should be greater than or equal to 0",
        "/params temperature nan": "/params temperature: nan is no number",
        "/params topp 1": "/params: no setting topp → did you mean top_p?",
        "/params max_new_tokens 0": "/params max_new_tokens: 0 is no number of tokens",
        "/params thinking on": "/params thinking: the chat template has no switch for thinking",
        "/params show_thinking dim": "/params show_thinking: unknown word 'dim'",
        '"""\nnever closed': "line 1: what begins with",
        "\udcff": "line 1: the input is not UTF-8 text",
    }.items():
        monkeypatch.setattr("builtins.input", lambda prompt, given=iter(typed.split("\n")): next_line(given))
        done = ft("chat", base)
        assert done.returncode == 2, (typed, done.stderr)
        assert said in " ".join(done.stderr.split()), typed
    assert not never
    monkeypatch.undo()
    for place in (there, tmp_path / "link.jsonl"):
        done = piped(base, said=["hi", f"/save {place}"])
        assert done.returncode == 2
        assert "is there already, and nothing is overwritten" in " ".join(done.stderr.split())
    assert there.read_text() == "mine"
    assert not (tmp_path / "nowhere.jsonl").exists()


def next_line(given: Iterator[str]) -> str:
    try:
        return next(given)
    except StopIteration:
        raise EOFError from None


def test_drawn_answers_are_those_of_generate(base: Path, tmp_path: Path) -> None:
    """One definition of asking and of drawing; without a seed another answer each time."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "hi"}])
    out = tmp_path / "out.jsonl"
    generate.run([str(base)], data=str(rows), output=str(out), max_new_tokens=6, options={"temperature": 1, "seed": 3})
    seeded, again, other = (
        piped(base, "--temperature", "1", *more, said=[before + "hi"])
        for before, more in (("", ("--seed", "3")), ("/params seed 3\n", ()), ("", ()))
    )
    assert seeded.stdout == lines(out)[0]["prediction"] + "\n"
    assert again.stdout == seeded.stdout
    assert other.stdout != seeded.stdout
    assert "has no effect: answers are greedy" in ft("chat", base, "--seed", "3").stderr


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of one base, and a fully trained one."""
    import yaml

    where, made = tmp_path_factory.mktemp("runs"), []
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": c * 6}]} for c in "xyz"]
    for name, row in zip(("first", "the second", "full"), rows, strict=True):
        values = {
            "version": 1, "stage": "sft", "model": {"name": str(base), "dtype": "float32"},
            "data": {"train": str(write_rows(where / "rows.jsonl", [row] * 4)), "max_length": 64},
            "adapter": {"method": "full"} if name == "full" else {"method": "lora", "r": 4, "lora_alpha": 8},
            "train": {"max_steps": 8, "effective_batch_size": 4, "learning_rate": 0.03, "save_steps": 100},
            "output": {"dir": str(where / name)},
        }  # fmt: skip
        (where / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        train(where / "recipe.yaml")
        made.append(str(where / name))
    return made


def test_adapters_are_switched_in_one_conversation(base: Path, runs: list[str], tmp_path: Path) -> None:
    alone = {name: piped(name, said=["a"]).stdout for name in (*runs[:2], base)}
    assert len(set(alone.values())) == 3
    file = tmp_path / "said.jsonl"
    said = ["a", "/adapter the second", "/reset", "a", "/adapter base", "/reset", "a", "/adapter one", "a"]
    done = piped("--adapter", f"one={runs[0]}", "--adapter", runs[1], said=[*said, "/adapter", f"/save {file}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("".join(alone[name] for name in (*runs[:2], base)))
    assert "one answers; /adapter the second | base" in done.stderr
    assert len(lines(file)[0]["messages"]) == 4, "the conversation goes on under another adapter"


@pytest.mark.parametrize("which", [0, 2])
def test_versus_base(base: Path, runs: list[str], which: int, tmp_path: Path) -> None:
    """Each answers and remembers as it does alone; a full fine-tuning has its base loaded beside it."""
    name, files = Path(runs[which]).name, [tmp_path / f"{i}.jsonl" for i in range(3)]
    for one, file in zip((base, runs[which]), files, strict=False):
        assert piped(one, said=["a", "b", f"/save {file}"]).returncode == 0
    done = piped(runs[which], "--versus-base", said=["a", "b", f"/save {files[2]}"])
    assert done.returncode == 0, done.stderr
    plain, tuned, saved = ([t["content"] for t in lines(file)[0]["messages"][1::2]] for file in files)
    both = [f"[base]\n{was}\n\n[{name}]\n{now}\n" for was, now in zip(plain, tuned, strict=True)]
    assert done.stdout == visible("".join(both))
    assert saved == tuned != plain
    assert ("loaded beside it" in done.stderr) == (which == 2)


def test_contradictions(base: Path, runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "load", lambda writers: pytest.fail("the model is loaded"))
    for arguments, said in {
        (base, "--versus-base"): "has no base to compare with",
        ("--adapter", f"base={runs[0]}"): "base is the model without adapters here",
        ("--adapter", f"a={runs[0]}", "--adapter", f"a={runs[1]}"): "two adapters have one name",
        (runs[0], runs[2]): "is no adapter, and only adapters of one base answer together",
        (runs[2], "--model", base): "given twice",
        (base, "--top-p", "0.5"): "--top-p: has no effect: answers are greedy",
        (base, "--thinking", "on"): "--thinking: the chat template has no switch",
    }.items():
        done = ft("chat", *arguments, stdin="hi")
        assert done.returncode == 2, (arguments, done.stderr)
        assert said in " ".join(done.stderr.split()), arguments


# --- one answer ---


def writer(base: Path) -> Any:
    made = writer_of(model_target(str(base)))
    load([made])
    return made


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("after", [0, 3])
def test_a_failing_model_is_told(base: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    one = writer(base)
    calls, real = [], one.network.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise IndexError("index out of range in self\nand more")
        return real(*arguments, **options)

    monkeypatch.setattr(one.network.model, "forward", forward)
    with pytest.raises(RunError, match="IndexError: index out of range in self; a shorter conversation"):
        stream(one, HI, GREEDY, 20, lambda *_: None)


def test_a_reader_that_goes_away_stops_the_answer(base: Path) -> None:
    one, shown = writer(base), []

    def show(text: str, thinks: bool) -> None:
        shown.append(text)
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        stream(one, HI, GREEDY, 20, show)
    assert len(shown) == 1


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

    monkeypatch.setattr(streaming, "answer", fail_on_the_second)
    for interactive in (False, True):
        seen.clear()
        typed = iter(["one", "two", "three", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt, typed=typed: next(typed))
        monkeypatch.setattr("sys.stdin.isatty", lambda now=interactive: now, raising=False)
        if not interactive:
            with pytest.raises(RunError, match="too long"):
                chat.run([str(base)], max_new_tokens=4)
            continue
        chat.run([str(base)], max_new_tokens=4)
        assert "too long" in " ".join(capsys.readouterr().err.split())
        assert len(seen[2]) < len(seen[1]) + 10, "the failed turn is not in the third prompt"


@pytest.mark.parametrize("times", [1, 2])
def test_interrupting_ends_the_answer_only(base: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The second Ctrl-C does not wait for the token, either."""
    one, calls, shown = writer(base), [], []
    real, before = one.network.model.forward, signal.getsignal(signal.SIGINT)

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        for _ in range(times if len(calls) == 4 else 0):
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(one.network.model, "forward", forward)
    monkeypatch.setattr(streaming, "stop_ids", lambda *_: [])
    with chat.stopped_by_ctrl_c(interactive=True) as stop:
        made = stream(one, HI, GREEDY, 400, lambda text, thinks: shown.append(text), stop=stop)
    assert len(calls) == 4
    assert made.turn == {"role": "assistant", "content": "".join(shown)}
    assert not made.whole
    assert signal.getsignal(signal.SIGINT) is before


def test_at_the_end_of_its_room_the_model_is_not_asked(base: Path) -> None:
    done = piped(base, said=["x" * 600])
    assert done.returncode == 2
    assert "the model was made for 512" in " ".join(done.stderr.split())


def test_greedy_is_greedy(base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "generation_config.json").write_text(json.dumps({"repetition_penalty": 5.0, "eos_token_id": 2}))
    said = [piped(folder, said=["hello"]) for folder in (base, other)]
    assert said[0].stdout == said[1].stdout
    assert "repetition_penalty 5.0" in said[1].stderr


# --- thinking ---

MARKS = Thinking(switch="enable_thinking", shown=True)
THOUGHT = "<think>\nso < 2\n</think>\n\nTwo <think> or less"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thinking_is_told_apart_however_it_comes(size: int) -> None:
    found: list[tuple[str, bool]] = []
    parts = Parts(MARKS, lambda text, thinks: found.append((text, thinks)), thinks=False)
    for start in range(0, len(THOUGHT), size):
        parts.add(THOUGHT[start : start + size])
    parts.add("", last=True)
    assert "".join(text for text, thinks in found if thinks) == "<think>\nso < 2\n</think>"
    assert "".join(text for text, thinks in found if not thinks) == "Two <think> or less"


@pytest.mark.parametrize("hidden", [False, True])
def test_thinking_is_shown_or_hidden(hidden: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with screen.Screen(hidden).answers(["one"]) as [show]:
        for text, thinks in (("<think>so", True), ("</think>", True), ("Two", False)):
            show(text, thinks)
    assert capsys.readouterr().out == ("Two\n" if hidden else "<think>so</think>\nTwo\n")


def test_columns_hold_both_answers_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    columns = screen.Columns(["base", "run"], hidden=False)
    columns.shows[0]("left " * 30, False)
    columns.shows[1]("<think>why</think>", True)
    columns.shows[1]("right\x1b[31m", False)
    columns.live = False
    console = Console(width=80, height=4, force_terminal=False)
    with console.capture() as captured:
        console.print(columns)
    text = captured.get()
    assert text.count("left") == 30
    assert text.splitlines()[0].split() == ["base", "run"]
    assert "right\\x1b[31m" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    columns.live = True
    with console.capture() as captured:
        console.print(columns)
    assert len(captured.get().splitlines()) <= 4, "while it is written only as much as there is room for"
