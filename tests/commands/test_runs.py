"""`ft runs`: what was trained below a folder, one run, two of them, one that goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import ft
from filelock import FileLock
from rich.cells import cell_len

from finetune.commands.records import diff, show, show_list
from finetune.commands.records.watch import curve
from finetune.errors import RunError
from finetune.run import records
from finetune.run.directory import Run
from finetune.run.opening import open_run
from finetune.terminal import progress

sys.path.append(str(Path(__file__).parent.parent / "report"))
sys.path.append(str(Path(__file__).parent.parent / "run"))
from report_kit import HOSTILE, make_run
from run_kit import recipe


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "my runs"
    make_run(folder / "good")
    make_run(folder / "deeper" / "worse", result={"train_loss": 0.9}, evaluated=False, train={"learning_rate": 1e-3})
    make_run(folder / "stopped", stage="dpo", done=False, evaluated=False)
    make_run(folder / "broken", stage="ppo", done=False, evaluated=False)
    (folder / "broken" / "error.json").write_text('{"error": "RunError: loss became nan"}', encoding="utf-8")
    (folder / "notes").mkdir()
    shutil.copy(folder / "good" / "recipe.yaml", folder / "notes")  # a copy of a recipe is no run
    return folder


def listed(*arguments: Any) -> list[dict[str, Any]]:
    done = ft("runs", "list", *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return found


def test_list(runs: Path) -> None:
    found = {one["name"]: one for one in listed(runs)}
    assert {name: one["status"] for name, one in found.items()} == {
        "broken": "failed", "deeper/worse": "done", "good": "done", "stopped": "interrupted",
    }  # fmt: skip
    assert found["good"]["metric"] == {"name": "exact_match", "value": 0.75, "ci": [0.6, 0.9]}
    assert found["deeper/worse"]["metric"] == {"name": "loss", "value": 0.5, "ci": [0.4, 0.6]}
    table = ft("runs", "list", runs).stdout
    for part in ("exact match", "0.75", "1:15", "interrupted"):  # cells are folded where the terminal is narrow
        assert part in table


def test_list_is_filtered_and_sorted(runs: Path) -> None:
    assert [one["name"] for one in listed(runs, "--stage", "sft")] == ["deeper/worse", "good"]
    assert [one["name"] for one in listed(runs, "--status", "failed")] == ["broken"]
    assert listed(runs, "--base", "LLAMA", "--sort", "stage")[0]["name"] == "stopped"
    assert [one["name"] for one in listed(runs, "--method", "full")] == []
    names = [one["name"] for one in listed(runs)]
    assert [one["name"] for one in listed(runs, "--reverse")] == names[::-1]
    none = ft("runs", "list", runs, "--stage", "kto")
    assert (none.returncode, none.stdout) == (0, "")
    assert "4 others are" in none.stderr
    wrong = ft("runs", "list", runs, "--sort", "colour")
    assert wrong.returncode == 2
    assert "one of name, stage" in wrong.stderr
    assert ft("runs", "list", runs / "nowhere").returncode == 2


def test_a_locked_run_is_running_and_a_lock_that_was_left_is_not(runs: Path) -> None:
    lock = runs / "stopped" / ".lock"
    with FileLock(lock):
        assert records.read(runs / "stopped").status == "running"
    lock.touch()
    assert records.read(runs / "stopped").status == "interrupted"


def test_a_failure_is_on_record_until_the_run_goes_on(tmp_path: Path) -> None:
    def failing(error: BaseException, **how: bool) -> None:
        with open_run(recipe(tmp_path / "run"), **how) as run:
            run.append_metrics({"step": 3, "loss": 1.0})
            raise error

    with pytest.raises(RunError):
        failing(RunError("loss became nan"))
    record = records.read(tmp_path / "run")
    assert (record.status, record.error["error"]) == ("failed", "RunError: loss became nan")
    assert "loss became nan" in ft("runs", "show", tmp_path / "run").stdout
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt(), overwrite=True)
    assert Run(tmp_path / "run").error.exists(), "what was replaced is back"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())
    assert records.read(tmp_path / "run").status == "interrupted"


def test_show(runs: Path) -> None:
    text = ft("runs", "show", runs / "deeper" / "worse").stdout
    assert "held-out loss" in text
    assert "0.5 [0.4, 0.6]" in text
    assert "train.learning_rate  0.001" in text
    assert "train.seed" not in text, "it is the default"
    found = json.loads(ft("runs", "show", runs / "good", "--json", "-").stdout)
    assert found["recipe"]["adapter"]["r"] == 8
    assert found["evaluation"][0]["after"]["exact_match"] == 0.75
    wrong = ft("runs", "show", runs / "god")
    assert wrong.returncode == 2
    assert "did you mean" in wrong.stderr
    assert ft("runs", "show", runs / "notes").returncode == 2


def test_diff(runs: Path) -> None:
    done = ft("runs", "diff", runs / "good", runs / "deeper" / "worse", "--json", "-")
    found = json.loads(done.stdout)["differences"]
    assert found["recipe"] == {"train.learning_rate": [2e-4, 1e-3], "train.seed": [42, None]}
    assert found["result"]["train_loss"] == [0.7, 0.9]
    assert found["result"]["held-out exact_match"] == [[0.75, 0.6, 0.9], None]
    assert found["versions"] == {}
    text = ft("runs", "diff", runs / "good", runs / "deeper" / "worse").stdout
    assert "versions: no difference" in text
    assert "0.75 [0.6, 0.9]" in text


def test_watch_ends_with_the_run(runs: Path) -> None:
    done = ft("runs", "watch", runs / "good")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "done"
    assert "ft eval, row 7  hello → " in done.stdout, "answers that ft eval kept"
    assert "no samples: ft eval of the run keeps some" in ft("runs", "watch", runs / "deeper" / "worse").stdout
    assert "step 40  epoch 4  loss" in done.stdout
    begun, over = threading.Event(), threading.Event()

    def training() -> None:
        with FileLock(runs / "stopped" / ".lock"):
            begun.set()
            over.wait(30)
            Run(runs / "stopped").append_metrics({"step": 41, "loss": 0.25})

    thread = threading.Thread(target=training)
    thread.start()
    begun.wait()
    command = [sys.executable, "-m", "finetune", "runs", "watch", str(runs / "stopped"), "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        first = watching.stdout.readline()
        over.set()
        rest = watching.stdout.read()
        thread.join()
    assert first.startswith("step 1 ")
    assert "step 41  loss 0.25" in rest
    assert rest.splitlines()[-1] == "interrupted at step 41"
    assert "no samples: eval.during answers some rows" in rest


def test_the_screen_of_watch_obeys_nothing_and_fits(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from finetune.commands.records import watch

    run = make_run(runs / "ppo", stage="ppo", text=HOSTILE + "\x1b[31m")
    console = Console(file=io.StringIO(), width=60, **progress.PLAIN)
    console.print(watch.screen(records.read(run), 60))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "reward mean" in text
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("⣀") + sum("\u2800" < c <= "\u28ff" for c in text) > 20


def test_curve_goes_from_its_first_to_its_last_value() -> None:
    lines = curve([(0, 4.0), (10, 1.0)], "loss", 40)
    assert lines[1].lstrip().startswith("4 ")
    assert lines[-2].lstrip().startswith("1 ")
    assert lines[-1].split() == ["0", "step", "10"]
    assert lines[1].split("│")[1][0] != "\u2800"
    assert lines[-2][-1] != "\u2800"
    columns = zip(*(line.partition("│")[2] for line in lines[1:-1]), strict=True)
    assert all(any(c != "\u2800" for c in column) for column in columns), "a line, not two points"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN: dict[str, tuple[str, str]] = {
    "a cut result": ("result.json", '{"stage": "sft", "eval": {"loss'),
    "another result": ("result.json", "[1, 2]"),
    "a result of other kinds": (
        "result.json",
        '{"stage": 3, "eval": [1], "decisions": "abc", "versions": 7, "train_loss": "x", "steps": "many", '
        '"seconds": null, "plan": {"memory": [1]}, "data": 4, "machine": [], "trainable_parameters": "a"}',
    ),
    "cut metrics": ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo'),
    "odd metrics": (
        "metrics.jsonl",
        '{"step": "a", "loss": {}}\n3\nnull\n{"step": 1e400, "loss": 1}\n{"step": 9, "loss": NaN, "grad_norm": [1]}\n',
    ),
    "a recipe without sections": ("recipe.yaml", "version: 1\nstage: [sft]\nmodel: 5\nadapter: lora\ntrain: []\n"),
    "a recipe that grows": ("recipe.yaml", BOMB),
    "an odd audit": (
        "data_audit.json", '{"preview": 3, "problems": {"a": 1}, "counts": [1], "tokens": "x", "kinds": [1]}',
    ),
    "an odd evaluation": (
        "evaluation.json",
        '{"sets": [3, {"name": 3}, {"n": 2, "comparisons": [{"metric": "m", "ci": 5}], "rows": [1], "after": []}]}',
    ),
    "odd samples": ("samples.jsonl", '3\n"x"\n{"step": [], "prompt": {}, "reply": 3, "score": "x"}\n'),
}  # fmt: skip


def test_a_broken_run_hides_no_other(tmp_path: Path) -> None:
    """Half, old, mended by hand: what cannot be read counts as not there, and everything else is shown."""
    folder = tmp_path / "runs"
    for name, (file, text) in BROKEN.items():
        (make_run(folder / name, stage="ppo") / file).write_text(text, encoding="utf-8")
    (make_run(folder / "a pipe", done=False) / "metrics.jsonl").unlink()
    os.mkfifo(folder / "a pipe" / "metrics.jsonl")
    (make_run(folder / "a folder", done=False) / "result.json").mkdir()
    good = make_run(tmp_path / "good")
    assert [one["name"] for one in listed(folder)] == sorted([*BROKEN, "a pipe", "a folder"])
    index = ft("report", folder)
    assert index.returncode == 0, index.stderr
    for path in folder.iterdir():
        if path.is_dir():
            for words in (["runs", "show", path], ["runs", "diff", path, good], ["report", path]):
                done = ft(*words)
                assert done.returncode == 0, (path.name, words[:2], done.stderr)


def test_a_stage_that_is_none_is_refused(runs: Path) -> None:
    done = ft("runs", "list", runs, "--stage", "sfft")
    assert done.returncode == 2
    assert "'sfft' is not possible here → one of pretrain, sft," in done.stderr


@pytest.mark.parametrize("width", [40, 80])
def test_tables_are_chinese_and_their_columns_straight(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("FT_LANG", "zh")
    monkeypatch.setattr(progress.output, "_width", width)
    monkeypatch.chdir(runs.parent)
    show_list(runs.name)
    table = capsys.readouterr().out
    diff(f"{runs.name}/good", f"{runs.name}/deeper/worse")
    parts = capsys.readouterr().out
    show(f"{runs.name}/stopped")
    one = capsys.readouterr().out
    for text in (table, parts):
        framed = [line for line in text.splitlines() if line[:1] in "┏┃┡│└"]
        assert all(cell_len(line) <= width for line in framed)
        assert {line[-1] for line in framed} <= set("┓┃┩│┘"), "no row is longer than its frame"
    assert bool("┏" in table) is (width == 80), "in a narrow terminal two lines a run"
    assert ("运行" in table) is (width == 80)
    assert "已中断" in table
    assert "配方:" in parts
    assert "留出 loss" in one or "配方中与默认不同的项" in one
    for text in (table, parts, one):
        assert not re.search(r"\b(held-out|interrupted|failed|done|figure|status|result|recipe|no difference)\b", text)


def test_step_lines_are_chinese(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FT_LANG", "zh")
    bar = progress.Progress("training")
    bar.start(4, 0)
    bar.step(2)
    bar.log({"step": 2, "loss": 0.5, "eval_loss": 0.25, "learning_rate": 1e-3, "rewards/margins": 1.0,
             "tokens_per_second": 100, "peak_memory_gb": 0.5})  # fmt: skip
    bar.log({"step": 2, "reward_mean": 0.5, "kl": 0.1, "response_length": 7.0, "peak_memory_gb": 0.5})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("第 2/4 步  loss 0.5000  留出 loss 0.2500  ")
    assert re.search(r"lr 1.00e-03  100 tok/s  0.5 GB  剩余 0:00$", first)
    assert second.startswith("第 2/4 步  奖励 +0.500  KL 0.100  7 个 token  0.5 GB  剩余 ")
