"""Exit codes and what stands on stderr, from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ft, ft_process

from finetune import __version__, cli


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sft",), "--recipe is missing → write ft sft RECIPE"),
        (("sft", "quickstart", "--recipe", "quickstart"), "given twice: quickstart and --recipe quickstart"),
        (("merge",), "--adapter is missing → write ft merge ADAPTER --output FOLDER"),
        (("merge", "nowhere"), "--output is missing"),
        (("train", "x.yaml"), "no command 'train' → ft sft"),
        (("sftt",), "Did you mean 'sft'"),
        (("sfr",), "Did you mean 'sft'"),
        (("help", "evl"), "Did you mean 'eval'"),
        (("recipes", "lits"), "Did you mean 'list'"),
        (("sft", "--recpie", "quickstart"), "--recipe"),
        (("align_dpo.yaml", "--dry-run"), "it is a recipe → ft dpo align_dpo.yaml --dry-run"),
        (("sft", "--recipe", "quickstrt"), "did you mean the shipped recipe quickstart.yaml?"),
        (("sft", "--recipe", "quickstart", "--set", "train.learning_ratee=1"), "did you mean learning_rate?"),
        (("pretrain", "--recipe", "quickstart"), "this is a recipe for `ft sft`, not `ft pretrain`"),
        (("nonsense",), "No such command"),
        (("merge", "--adapter", "nowhere", "--output", "x"), "no such run or adapter"),
        (("recipes", "show", "nothing"), "no such recipe"),
    ],
)
def test_the_user_can_fix_it(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = ft(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    """Python's own end of a process."""
    done = ft_process("sft", "--recipe", "quickstrt", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_version_and_help() -> None:
    assert ft_process("--version").stdout == f"ft {__version__}\n"
    helped = ft("--help")
    for command in ("pretrain", "sft", "merge", "eval", "generate", "chat", "doctor", "recipes"):
        assert f"\n  {command}" in helped.stdout


@pytest.mark.parametrize("arguments", [("-h",), ("sft", "-h"), ("help",), ("help", "sft"), ("recipes", "new", "-h")])
def test_help_however_it_is_asked_for(arguments: tuple[str, ...]) -> None:
    done = ft(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ft")


def test_a_recipe_is_a_plain_argument(tmp_path: Path) -> None:
    plain = ft("sft", "quickstart", "--dry-run", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout == ft("sft", "--recipe", "quickstart", "--dry-run", cwd=tmp_path).stdout


def test_recipes(tmp_path: Path) -> None:
    assert "quickstart.yaml" in ft("recipes", "list").stdout
    assert "model: {name: tiny-llama}" in ft("recipes", "show", "quickstart").stdout
    schema = json.loads(ft("recipes", "schema").stdout)
    assert "SftRecipe" in schema["$defs"]
    made = ft("recipes", "new", "mine.yaml", "--data", "builtin:tickets/train", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "$schema: ft-recipe.schema.json" in (tmp_path / "mine.yaml").read_text()
    checked = ft("sft", "--recipe", "mine.yaml", "--dry-run", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    again = ft("recipes", "new", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("data", "stage"),
    [
        ("builtin:alpaca", "sft"),
        ("builtin:preference", "dpo"),
        ("builtin:ranked", "dpo"),
        ("builtin:unpaired", "kto"),
        ("builtin:text", "pretrain"),
        ("not there.jsonl", "sft"),
        ("owner/dataset", "sft"),
    ],
)
def test_a_new_recipe_is_for_the_stage_its_rows_are_for(tmp_path: Path, data: str, stage: str) -> None:
    """Pairs in a recipe for ft sft would be refused, and so would that recipe by ft dpo."""
    from finetune.commands.recipes import new

    new(str(tmp_path / "mine.yaml"), data=data)
    assert f"stage: {stage}\n" in (tmp_path / "mine.yaml").read_text("utf-8")
    new(str(tmp_path / "asked.yaml"), stage="reward", data=data)
    assert "stage: reward\n" in (tmp_path / "asked.yaml").read_text("utf-8")


@pytest.mark.parametrize(("data", "reward"), [("builtin:alpaca", "functions"), ("builtin:preference", "train")])
def test_a_new_recipe_of_ppo_has_a_reward_that_its_rows_can_give(tmp_path: Path, data: str, reward: str) -> None:
    from finetune.commands.recipes import new
    from finetune.recipe.file import load
    from finetune.recipe.stages import PpoRecipe

    new(str(tmp_path / "ppo.yaml"), stage="ppo", data=data)
    assert getattr(load(str(tmp_path / "ppo.yaml"), PpoRecipe).reward, reward)


TABLES = (
    "eval", "plan", "compare", "doctor", "models list", "recipes list", "recipes explain", "data check", "data preview",
    "runs list", "runs show", "runs diff",
)  # fmt: skip


@pytest.mark.parametrize("command", TABLES)
def test_tables_are_there_as_json(command: str, tmp_path: Path) -> None:
    assert "--json FILE|-" in ft(*command.split(), "--help").stdout
    if command in ("doctor", "models list", "recipes list", "recipes explain"):
        printed, kept = ft(*command.split(), "--json", "-"), ft(*command.split(), "--json", tmp_path / "out.json")
        assert (printed.returncode, kept.returncode) == (0, 0), printed.stderr
        found = json.loads(printed.stdout)
        assert found.keys() == json.loads((tmp_path / "out.json").read_text("utf-8")).keys()
        (tmp_path / "mine.json").write_text("{}")
        refused = ft(*command.split(), "--json", tmp_path / "mine.json")
        assert refused.returncode == 2
        assert (tmp_path / "mine.json").read_text() == "{}"


def test_a_key_as_json() -> None:
    (found,) = json.loads(ft("recipes", "explain", "data.packing", "--json", "-").stdout)["keys"]
    assert (found["key"], found["values"], found["default"]) == ("data.packing", "true | false", False)
    assert "sft" in found["stages"]
    foreign = ft("recipes", "explain", "cutoff_len", "--json", "-")
    assert (foreign.returncode, foreign.stdout) == (2, "")
    assert "data.max_length" in foreign.stderr


def test_doctor() -> None:
    done = ft("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "device", "precision", "built-in bases"):
        assert word in done.stdout


def test_a_file_that_ends_too_early_is_no_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """typer makes an Abort of every EOFError."""

    def cut_off(*_: object) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr("finetune.commands.doctor.run", cut_off)
    monkeypatch.setattr("sys.argv", ["ft", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "EOFError: Ran out of input" in capsys.readouterr().err
