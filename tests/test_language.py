"""FT_LANG and the locale; what is shown in Chinese, and what stays as it is."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from finetune import language
from finetune.errors import Problem, RunError, UserError, render
from finetune.language import in_chinese
from finetune.recipe import reference
from finetune.terminal.progress import console, note, warn

TABLE = Path(__file__).parent / "fixtures" / "bad_inputs.txt"
ENGLISH = re.compile(
    r"\b(the|is|are|an|of|no|not|to|or|and|in|which|with|it|give|leave|set|one|has|have|was|that|than|does|cannot|from|"
    r"for|write|use|must|be|did|you|mean|there|but|on|at|holds|missing)\b"
)
VALUES = re.compile(r"'[^']*'|`[^`]*`|--?\w[\w-]*(=\S+)?|\S*[/.:_\\]\S*|on 或 off")
"""What is quoted, paths, keys, options."""


@pytest.fixture
def zh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_LANG", "zh")


@pytest.mark.parametrize(
    ("given", "chinese"),
    [
        ({"FT_LANG": "zh"}, True), ({"FT_LANG": "zh_CN.UTF-8"}, True), ({"FT_LANG": "ZH-Hans"}, True),
        ({"LANG": "zh_CN.UTF-8"}, True), ({"LC_ALL": "zh_TW.UTF-8", "LANG": "C"}, True),
        ({"LC_MESSAGES": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False), ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, True),
        ({"FT_LANG": "en", "LANG": "zh_CN.UTF-8"}, False), ({"FT_LANG": " ", "LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "en_US.UTF-8"}, False), ({}, False),
    ],
)  # fmt: skip
def test_who_decides(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], chinese: bool) -> None:
    for name in (language.VARIABLE, *language.LOCALE):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert language.chinese() is chinese
    assert language.unknown() is None


def test_a_terminal_without_chinese_shows_english(monkeypatch: pytest.MonkeyPatch, zh: None) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert render(UserError("no such file")) == ["no such file"]
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="gbk"))
    assert render(UserError("no such file")) == ["没有这个文件"]


def test_problems_keep_their_place_and_their_key(zh: None) -> None:
    problem = Problem("unknown dtype 'missing'", path="the rows.jsonl", row=3, key="--dtype", fix="one of a, b")
    error = UserError([problem, *[Problem("missing", key="train")] * 30])
    lines = render(error)
    assert lines[0] == "the rows.jsonl, 第 3 行: --dtype: 未知的 dtype 'missing' → 可选：a, b"
    assert lines[-1] == "…… 另有 11 个问题"
    assert str(error).startswith("the rows.jsonl, row 3: --dtype: unknown dtype"), "what is kept stays English"


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("holds no {x} and nothing else {0}", "holds no {x} and nothing else {0}"),
        ("use the same words in another order", "use the same words in another order"),
        ("is a folder of which nobody knows", "is a folder of which nobody knows"),
        ("has no column 'missing', which 'no such file' wants", "没有 'missing' 列，而 'no such file' 需要它"),
        ("write {input, output}", "写成 {input, output}"),
        ("is not JSON (Expecting value: line 2 column 5 (char 7))",
         "不是 JSON（此处应有一个值：第 2 行第 5 列（第 7 个字符））"),
        ("original weights", "原始权重"),
        ("8 threads", "8 线程"),
        ("whole threads", "whole threads"),
        ("cannot be read (what no catalogue knows)", "无法读取（what no catalogue knows）"),
    ],
)  # fmt: skip
def test_whole_or_not_at_all(english: str, chinese: str) -> None:
    assert in_chinese(english) == chinese


def test_long_texts_and_lone_signs() -> None:
    for text in ("a: b, " * 20_000, "is {0}: {a} and {b} " * 5_000, "{", "}}", "{a}", ": ", ""):
        assert in_chinese(text) == text


def test_errors_notes_and_warnings(zh: None) -> None:
    assert render(RunError("stopped; nothing was written")) == ["已停止；什么都没有写"]
    with console.capture() as shown:
        note("written to runs/a")
        warn("the last weights are kept")
    assert shown.get() == "已写入 runs/a\n警告: 保留最后的权重\n"


def lines_of_the_table() -> list[str]:
    blocks = TABLE.read_text(encoding="utf-8").split("\n\n")
    found = [line for block in blocks if block.startswith("$") for line in block.strip("\n").split("\n")[1:]]
    assert len(found) > 330
    return sorted(set(found))


def ways(line: str) -> list[str]:
    """The line in Chinese, for each place where the message may begin."""
    head, _, fix = line.partition(" → ")
    parts = head.split(": ")
    heads = [head, *(": ".join(parts[i:]) for i in range(1, len(parts)))]
    return [f"{in_chinese(text)} {in_chinese(fix)}" for text in heads if in_chinese(text) != text]


def test_the_messages_of_bad_inputs_are_chinese() -> None:
    left = [
        line for line in lines_of_the_table()
        if all(ENGLISH.search(VALUES.sub("", shown)) for shown in ways(line))
    ]  # fmt: skip
    assert left == []


def pages(command: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = getattr(command, "commands", {})
    return [words, *(page for name, one in below.items() for page in pages(one, (*words, name)))]


@pytest.mark.parametrize("width", [50, 80])
def test_every_help_fits_and_is_chinese(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], zh: None, width: int
) -> None:
    from finetune.cli.chinese import in_chinese as with_help
    from finetune.cli.commands import app

    monkeypatch.setenv("COLUMNS", str(width))
    command = with_help(app)
    for words in pages(command):
        command([*words, "--help"], prog_name="ft", standalone_mode=False)
        page = capsys.readouterr().out
        lines = [line for line in page.partition("\n\n")[2].splitlines() if not line.strip().startswith("ft ")]
        body = "\n".join(lines)
        assert not ENGLISH.search(VALUES.sub("", body.replace("on|off", ""))), (words, body)
        assert "显示这段帮助并退出" in re.sub(r"\s", "", page)
        for line in lines:
            assert cell_len(line) <= width or len(line.split()) == 1, (words, line)
            assert not line.strip().startswith(("，", "。", "、", "；", "：", "）")), (words, line)


def ft(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *words], capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip


def test_commands() -> None:
    wrong = ft("sft", FT_LANG="zh")
    assert (wrong.returncode, wrong.stderr) == (2, "缺少 --recipe → 写：ft sft RECIPE\n")
    wrong = ft("chat", "tiny-llama", "--seed", "-1", FT_LANG="zh")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "错误：'--seed' 的值无效：应大于或等于 0"
    assert ft("sft", FT_LANG="fr").stderr == "FT_LANG: unknown language 'fr' → one of zh, en, or unset it\n"
    shown = ft("recipes", "explain", "train.learning_rate", FT_LANG="zh").stdout
    assert shown == "train.learning_rate: 数 > 0   默认: 0.0002\n  峰值学习率。\n"


def test_what_is_written_and_what_machines_read_stays_english(tmp_path: Path, zh: None) -> None:
    assert reference.document().startswith("# Recipe keys")
    assert not re.search("[一-鿿]", reference.document())
    (tmp_path / "rows.jsonl").write_text('{"instruction": "q", "output": ""}\n', encoding="utf-8")
    checked = ft("data", "check", str(tmp_path / "rows.jsonl"), "--json", "-")
    (problem,) = json.loads(checked.stdout)["problems"]
    assert problem["message"] == "turn 2: the assistant's answer is empty → fill it in, or remove the row"
    told = ft("data", "check", str(tmp_path / "rows.jsonl")).stdout
    assert "rows.jsonl, 第 1 行: 第 2 轮：assistant 的回答是空的 → 填上它，或删掉这一行" in told
