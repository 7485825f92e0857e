"""A run with data.thinking: what it records, how it asks with thinking on and off, how its answers are scored."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from conftest import ft, train, write_rows
from rich.console import Console

from finetune.base import Base
from finetune.commands import chat, evaluate, generate, ppo
from finetune.commands.chat import screen, talk
from finetune.data import prompts, thinking
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.evaluation import answering, generation
from finetune.evaluation.streaming import Parts, Streamed, turn_of
from finetune.recipe.file import with_settings
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import PLAIN

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with Qwen3's template, rows without thinking, and a run with data.thinking: empty."""
    made = tmp_path_factory.mktemp("thinking")
    shutil.copytree(base, made / "base")
    (made / "base" / "chat_template.jinja").write_text((TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"))
    write_rows(made / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(8)])
    values = {
        "version": 1, "stage": "sft", "model": {"name": str(made / "base"), "dtype": "float32"},
        "data": {"train": str(made / "rows.jsonl"), "max_length": 128, "thinking": "empty"},
        "adapter": {"method": "lora", "r": 4}, "train": {"max_steps": 1, "effective_batch_size": 4},
        "eval": {"data": str(made / "rows.jsonl"), "max_new_tokens": 4}, "output": {"dir": str(made / "run")},
    }  # fmt: skip
    (made / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(made / "recipe.yaml", "eval.data=null")
    return made


def test_a_run_says_what_it_was_trained_with(folder: Path) -> None:
    told = {"data.thinking": "empty", "rows_with": 0, "rows_without": 8, "shown": ["off"]}
    assert json.loads((folder / "run" / "result.json").read_text())["thinking"] == told
    assert json.loads((folder / "run" / "adapter" / "thinking.json").read_text()) == told
    assert Base.open(ModelConfig(name=str(folder / "base")), folder / "run" / "adapter").trained == told


def answers(monkeypatch: pytest.MonkeyPatch, written: list[str]) -> list[str]:
    """Generation is replaced by these answers; the texts of the prompts that it gets."""
    seen: list[str] = []

    def generate(model: Any, encoder: Any, prompts: list[list[int]], *_: Any) -> list[str]:
        seen.extend(encoder.tokenizer.decode(prompt) for prompt in prompts)
        return written

    monkeypatch.setattr(generation, "generate", generate)
    return seen


def test_eval_asks_as_it_was_trained_and_looks_behind_the_thinking(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(4)]
    rows[3]["completion"] = "<think>\nthree\n</think>\n\n3"
    data, file, lines = (tmp_path / name for name in ("held.jsonl", "eval.json", "lines.jsonl"))
    write_rows(data, rows)
    seen = answers(monkeypatch, ["<think>\nhm 7\n</think>\n\n0", "1", "<think>\nwell, 2", "<think>\nx\n</think>\n3"])
    more = {"data": str(data), "json_file": str(file), "predictions": str(lines)}
    evaluate.run([str(folder / "run")], **more)
    said = " ".join(capsys.readouterr().err.split())
    assert all(prompt.endswith(BLOCK) for prompt in seen)
    run = json.loads(file.read_text())["runs"][0]
    assert run["generation"]["thinking"] == "off"
    assert (run["metrics"]["with_thinking"], run["metrics"]["unfinished_thinking"]) == (3, 1)
    assert run["metrics"]["exact_match"] == pytest.approx(0.75)
    assert "3 of 4 answers think first; only what stands behind that is scored" in said
    assert "1 of 4 answers end inside their thinking and count as no answer" in said
    assert "training only showed it" not in said
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["prediction"] for row in found] == ["0", "1", "", "3"]
    assert [row.get("thinking") for row in found] == ["hm 7", None, "well, 2", "x"]
    assert [row["correct"] for row in found] == [1.0, 1.0, 0.0, 1.0]

    seen.clear()
    evaluate.run([str(folder / "run")], compare_base=True, thinking="on", **more)
    assert len(seen) == 8
    assert all(prompt.endswith("assistant\n") for prompt in seen)
    said = " ".join(capsys.readouterr().err.split())
    assert "thinking is on, and training only showed it off (data.thinking: empty)" in said


def test_generate_asks_the_same_and_keeps_thinking_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    write_rows(data, [{"prompt": "say 0"}, {"prompt": "say 1"}])
    replies, seen = ["<think>\nhm\n</think>\n\n0", "1"], []

    def written(model: Any, prompts: list[list[int]], *_: Any) -> Any:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [[(i, tokenizer.encode(reply, add_special_tokens=False)) for i, reply in enumerate(replies)]]

    tokenizer = Base.open(ModelConfig(name=str(folder / "base"))).tokenizer
    monkeypatch.setattr(answering, "written", written)
    for word, end in ((None, BLOCK), ("off", BLOCK), ("on", "assistant\n")):
        seen.clear()
        generate.run([str(folder / "run")], data=str(data), output=str(output), thinking=word, overwrite=True)
        assert all(prompt.endswith(end) for prompt in seen)
        assert len(seen) == 2
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["prediction"] for row in found] == ["0", "1"]
        assert [row.get("prediction_thinking") for row in found] == ["hm", None]
    with pytest.raises(UserError, match=r"models\.run\.thinking: false now, and true"):
        generate.run([str(folder / "run")], data=str(data), output=str(output), thinking="off")


def test_the_recipe_says_it_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answers(monkeypatch, ["0"] * 8)
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load((folder / "recipe.yaml").read_text())
    for word, end in ((True, "assistant\n"), ("off", BLOCK)):  # YAML reads `on` as true
        values["eval"]["thinking"] = word
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        seen.clear()
        evaluate.run([], recipe=str(path))
        assert all(prompt.endswith(end) for prompt in seen)


def test_refused_by_name(base: Path, folder: Path, tmp_path: Path) -> None:
    rows = folder / "rows.jsonl"
    for command in (("chat", base), ("eval", base, "--data", rows)):
        done = ft(*command, "--thinking", "off")
        assert done.returncode == 2
        assert "--thinking" in done.stderr
        assert "no switch for thinking" in done.stderr
        done = ft(*command, "--thinking", "maybe")
        assert done.returncode == 2
        assert "one of on, off" in done.stderr
    for key, value in (("data.thinking", "empty"), ("eval.thinking", "on")):
        recipe = folder / "recipe.yaml"
        settings = [w for s in (f"model.name={base}", "data.thinking=keep", f"{key}={value}") for w in ("--set", s)]
        done = ft("sft", recipe, *settings, "--output", tmp_path / "out", "--dry-run")
        assert done.returncode == 2, done.stdout
        assert f"{key}: " in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_merged_model_remembers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ft("merge", folder / "run", "--output", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "ask the merged model with enable_thinking: false" in " ".join(done.stderr.split())
    assert json.loads((tmp_path / "merged" / "thinking.json").read_text())["shown"] == ["off"]
    assert "thinking.json" in json.loads((tmp_path / "merged" / "merge.json").read_text())["files"]
    asked = []

    def reply(writer: Any, messages: Any, *_: Any) -> Streamed:
        asked.append(writer.prompter.encoder.tokenizer.decode(writer.prompter.ids(Conversation(messages))))
        return Streamed({"role": "assistant", "content": "yes", "reasoning_content": "why"}, True)

    monkeypatch.setattr(talk, "stream", reply)
    for thinks, end in ((None, BLOCK), ("off", BLOCK), ("on", "assistant\n")):
        lines = iter(["hello", "more", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))  # noqa: B023
        asked.clear()
        chat.run([str(tmp_path / "merged")], thinking=thinks)
        assert [text.endswith(end) for text in asked] == [True, True]
        assert "assistant\nyes<|im_end|>" in asked[1], "without the thinking, as the template has it"


def test_prompts_of_ppo_are_asked_as_the_recipe_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    ends: list[str] = []

    def look(config: Any, encoder: Any, **_: Any) -> None:
        ends.append(encoder.tokenizer.decode(encoder.prompt_ids([{"role": "user", "content": "q"}])))
        raise Stop

    monkeypatch.setattr(prompts, "load_prompts", look)
    (folder / "rule.py").write_text("def score(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    values: dict[str, Any] = {
        "version": 1, "stage": "ppo", "model": {"name": str(folder / "base"), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl")}, "output": {"dir": str(folder / "ppo")},
        "reward": {"functions": [f"{folder / 'rule.py'}:score"]},
    }  # fmt: skip
    start = f"model.adapter={folder / 'run'}"
    for settings, end in (
        ([], "assistant\n"),
        (["ppo.thinking=off"], BLOCK),
        (["data.thinking=empty"], BLOCK),
        (["data.thinking=empty", "ppo.thinking=on"], "assistant\n"),
        ([start], BLOCK),
        ([start, "ppo.thinking=on"], "assistant\n"),
    ):
        with pytest.raises(Stop):
            ppo.run(with_settings(copy.deepcopy(values), "ppo", settings))
        assert ends[-1].endswith(end), settings


def test_thinking_is_dim_in_a_terminal_and_plain_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ["<think>\n", "why \x1b[2J", "not</think>\n", "\nyes ", "sir"]
    with screen.Screen().answers(["one"]) as [show]:
        shown = Parts(thinking.USUAL, show, False)
        for part in parts:
            shown.add(part)
    assert "\x1b" not in capsys.readouterr().out.replace("\\x1b", "")
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, color_system="standard", **PLAIN)
    monkeypatch.setattr(screen, "output", terminal)
    with screen.Screen().answers(["one"]) as [show]:
        shown = Parts(thinking.USUAL, show, False)
        for part in parts:
            shown.add(part)
    assert "\x1b[2mwhy " in written.getvalue()
    assert "\x1b[2J" not in written.getvalue()
    assert "yes" not in written.getvalue()
    assert "yes sir" in capsys.readouterr().out
    with screen.Screen().answers(["one"]) as [show]:
        Parts(thinking.USUAL, show, True).add("why</think>yes")  # opened by the prompt
    assert "\x1b[2mwhy</think>" in written.getvalue()


def test_a_streamed_answer_becomes_a_turn(folder: Path) -> None:
    encoder = Base.open(ModelConfig(name=str(folder / "base"))).encoder
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "why"}
    assert turn_of("<think>why</think>\n\nyes", encoder, False) == turn
    assert turn_of("why</think>yes", encoder, True) == turn
    assert turn_of("yes", encoder, False) == {"role": "assistant", "content": "yes"}
