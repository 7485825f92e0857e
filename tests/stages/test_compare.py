"""`ft compare`: every job trained and measured in processes of its own, what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe import SftRecipe
from finetune.recipe_file import load
from finetune.stages import compare


def test_a_comparison_from_start_to_end(
    recipe: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(compare, "FACTORS", (1.0,))
    section = {"data": str(rows), "limit": 8, "max_new_tokens": 4}
    checked = load(str(recipe(eval=section, train={"max_steps": 4, "learning_rate": 1e-2})), SftRecipe)
    folder = tmp_path / "comparison"
    compare.run(checked, *compare.parse("lora", "none", "1"), str(folder))
    (job,) = json.loads((folder / "compare.json").read_text())["jobs"]
    assert job["method"] == "lora"
    assert job["trainable_parameters"] > 0
    assert 0 <= job["metrics"]["exact_match"] <= 1
    assert job["metrics"]["exact_match_ci"][0] <= job["metrics"]["exact_match_ci"][1]
    assert 0 < job["backward_share"] < 1
    assert job["adapter_bytes"] == sum(
        file.stat().st_size for file in (folder / "lora" / "adapter").glob("*.safetensors")
    )
    assert [step["learning_rate"] for step in job["search"]] == [job["learning_rate"]]
    table = (folder / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert "| lora |" in table
    assert (folder / "compare.png").stat().st_size > 1000

    monkeypatch.setattr(compare, "subprocess_run", lambda command: pytest.fail(f"done already: {command}"))
    compare.run(checked, *compare.parse("lora", "none", "1"), str(folder))


@pytest.mark.parametrize(
    ("lists", "what"),
    [
        (("lore", "none", "1"), "unknown method 'lore'"),
        (("lora", "int2", "1"), "unknown kind 'int2'"),
        (("lora", "none", "0.5,2"), "not shares: 0.5,2"),
    ],
)
def test_bad_lists(lists: tuple[str, str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        compare.parse(*lists)


def test_impossible_pairs_are_refused_before_anything_runs(
    recipe: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    checked = load(str(recipe(eval={"data": str(rows)})), SftRecipe)
    with pytest.raises(UserError):
        compare.run(checked, ["lora", "full"], ["int4"], [1.0], str(tmp_path / "comparison"))
    assert not (tmp_path / "comparison").exists()
