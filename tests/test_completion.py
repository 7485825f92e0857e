"""What the Tab key offers, by the protocols of the shells; and that asking costs no heavy import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ft

from finetune import cli
from finetune.cli import completion
from finetune.recipe import reference
from finetune.recipe.stages import RECIPES


def offered(monkeypatch: pytest.MonkeyPatch, line: str, cwd: Path | None = None) -> list[str]:
    """What bash is given at the end of `line`, whose words stand as bash cuts them."""
    words = line.split(" ")
    monkeypatch.setenv("_FT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    done = ft(cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("ft s", ["sft", "serve"]),
        ("ft runs li", ["list"]),
        ("ft eval --compare", ["--compare-base"]),
        ("ft sft quick", ["quickstart.yaml"]),
        ("ft dpo --recipe align_", ["align_dpo.yaml"]),
        ("ft recipes show align_p", ["align_ppo.yaml"]),
        ("ft sft --set train.learning_ra", ["train.learning_rate=", "train.learning_rate=0.0002"]),
        ("ft sft --set adapter.method = lo", ["lora", "loha", "lokr"]),
        ("ft sft --set model.name = tiny-q", ["tiny-qwen"]),
        ("ft sft --set train.max_steps = 3 --set data.pack", ["data.packing=", "data.packing=true"]),
        ("ft recipes explain ppo.kl_co", ["ppo.kl_coef"]),
        ("ft compare quickstart.yaml --methods lora,bit", ["lora,bitfit"]),
        ("ft runs list --status d", ["done"]),
        ("ft data check builtin:tickets/te", ["builtin:tickets/test"]),
        ("ft merge --for", ["--format"]),
    ],
)  # fmt: skip
def test_offered(line: str, some: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = offered(monkeypatch, line, tmp_path)
    assert found[: len(some)] == some or set(some) <= set(found)
    last = line.rpartition(" ")[2].rpartition(",")[2]
    assert all(last in one for one in found), found


def test_only_recipes_and_keys_of_the_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert offered(monkeypatch, "ft dpo quick", tmp_path) == []
    assert offered(monkeypatch, "ft sft --set ppo.", tmp_path) == []
    assert "ppo.kl_coef=" in offered(monkeypatch, "ft ppo --set ppo.", tmp_path)
    assert "ppo.kl_coef=" in offered(monkeypatch, "ft plan --set ppo.", tmp_path)


def test_runs_and_files_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("runs/a", "runs/deep/b c", "adapters/x"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("runs/a", "runs/deep/b c"):
        (tmp_path / name / "recipe.yaml").touch()
    (tmp_path / "adapters" / "x" / "adapter_config.json").touch()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "rows.jsonl").touch()
    assert offered(monkeypatch, "ft runs show r", tmp_path) == ["runs/a", r"runs/deep/b\ c", "runs/", "runs/deep/"]
    assert offered(monkeypatch, "ft chat runs/d", tmp_path)[0] == r"runs/deep/b\ c"
    assert "adapters/x" in offered(monkeypatch, "ft merge ", tmp_path)
    assert offered(monkeypatch, "ft sft mi", tmp_path) == ["mine.yaml"]
    assert offered(monkeypatch, "ft generate --data ro", tmp_path) == ["rows.jsonl"]
    assert offered(monkeypatch, "ft sft --set data.train = ro", tmp_path) == ["rows.jsonl"]
    assert offered(monkeypatch, "ft runs show nowhere/", tmp_path) == []


def test_a_home_full_of_folders_is_not_gone_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "a" / "run" / "recipe.yaml").touch()
    for name in range(30):
        (tmp_path / "z" / str(name) / "deep").mkdir(parents=True)
    monkeypatch.setattr(completion, "LOOKS", 20)
    looked: list[Path] = []
    monkeypatch.setattr(
        completion, "folders_in", lambda path, of=completion.folders_in: looked.append(path) or of(path)
    )
    assert "a/run" in offered(monkeypatch, "ft chat ", tmp_path)
    assert 2 < len(looked) <= 20


@pytest.mark.parametrize("stage", RECIPES)
def test_keys_are_those_of_the_recipes(stage: str) -> None:
    named = {key.name for key in reference.keys() if stage in key.stages and key.name != "extends"}  # noqa: SIM118
    sections = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
    known = set(completion.keys(stage))
    assert known <= named
    assert named - known <= sections
    assert tuple(RECIPES) == completion.STAGES


def test_other_shells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("_FT_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "ft sft --set adapter.method=lok")
    assert "adapter.method=lokr" in ft(cwd=tmp_path).stdout
    monkeypatch.setenv("_FT_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert ft(cwd=tmp_path).stdout == "adapter.method=lokr\n"


def test_an_answer_imports_nothing_heavy(tmp_path: Path) -> None:
    words = ["ft", "sft", "--set", "train.learning_ra"]
    asked = {"_FT_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": "3"}
    code = (
        "import atexit, sys; sys.argv = ['ft']; from finetune.cli import main;"
        "heavy = ('torch', 'transformers', 'rich', 'numpy', 'finetune.recipe.stages');"
        "atexit.register(lambda: print([name for name in heavy if name in sys.modules])); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "train.learning_rate=\ntrain.learning_rate=0.0002\n[]\n", done.stderr


def test_in_bash_itself(tmp_path: Path) -> None:
    """The whole way: its script, the words as it cuts them, what comes back."""
    (tmp_path / "ft").write_text(f'#!/bin/sh\nexec {sys.executable} -m finetune "$@"\n')
    (tmp_path / "ft").chmod(0o755)
    lines = (
        'eval "$(ft --show-completion)"',  # typer finds out which shell started it
        "COMP_WORDS=(ft sft --set adapter.method = lok); COMP_CWORD=5; _ft_completion ft",
        'echo "${COMPREPLY[@]}"',
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(cli.__file__).parent.parent.parent)}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env={**os.environ, **path}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "lokr\n", done.stderr
