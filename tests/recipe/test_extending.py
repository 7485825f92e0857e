"""`extends: other.yaml`: sections are merged key by key, problems name the file that they stand in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ft

from finetune.errors import UserError
from finetune.recipe import file
from finetune.recipe.stages import RECIPES

BASE: dict[str, Any] = {
    "version": 1, "stage": "sft", "model": {"name": "tiny-llama", "dtype": "float32"},
    "data": {"train": "builtin:tickets/train", "max_length": 288, "max_samples": 64},
    "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
    "train": {"learning_rate": 1e-3, "max_steps": 5}, "output": {"dir": "runs/base"},
}  # fmt: skip


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def extended(folder: Path, base: dict[str, Any] | None = None, **own: Any) -> Any:
    write(folder / "base.yaml", BASE if base is None else base)
    return file.load(str(write(folder / "mine.yaml", {"extends": "base.yaml", **own})), None)


def test_sections_are_merged_key_by_key(tmp_path: Path) -> None:
    found = extended(tmp_path, train={"max_steps": 7}, output={"dir": "runs/mine"})
    assert (found.train.max_steps, found.train.learning_rate) == (7, 1e-3)
    assert (found.output.dir, found.data.max_length, found.adapter.r) == ("runs/mine", 288, 4)
    assert extended(tmp_path, data={"train": ["a.jsonl", "b.jsonl"]}).data.train == ["a.jsonl", "b.jsonl"]


def test_an_empty_section_says_nothing_and_null_means_the_default(tmp_path: Path) -> None:
    found = extended(tmp_path, train=None, data={"max_length": None}, adapter={"lora_alpha": None})
    assert found.train.max_steps == 5
    assert found.data.max_length == 2048
    assert found.adapter.lora_alpha == 32
    assert found.adapter.r == 4


def test_another_method_leaves_out_the_keys_of_the_first(tmp_path: Path) -> None:
    found = extended(tmp_path, adapter={"method": "bitfit"})
    assert found.adapter.method == "bitfit"
    with pytest.raises(UserError, match=r"mine.yaml, line 4: adapter.r: unknown key"):
        extended(tmp_path, adapter={"method": "bitfit", "r": 4})


def test_a_base_needs_not_be_a_recipe_of_its_own(tmp_path: Path) -> None:
    common = {"train": {"learning_rate": 1e-4}, "model": {"name": "tiny-qwen"}}
    own = {"version": 1, "stage": "dpo", "data": {"train": "builtin:tickets/pairs_train"}, "output": {"dir": "r"}}
    found = extended(tmp_path, common, **own)
    assert (found.stage, found.model.name, found.train.learning_rate) == ("dpo", "tiny-qwen", 1e-4)


def test_a_problem_names_the_file_that_it_stands_in(tmp_path: Path) -> None:
    wrong = {**BASE, "train": {"lerning_rate": 1}}
    with pytest.raises(UserError) as caught:
        extended(tmp_path, wrong, output={"dir": "r", "dri": 2})
    lines = {str(p.path).rpartition("/")[2]: (p.line, p.key) for p in caught.value.problems}
    assert lines == {"base.yaml": (15, "train.lerning_rate"), "mine.yaml": (4, "output.dri")}


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ("nowhere.yaml", r"mine.yaml, line 1: extends: no such recipe: nowhere.yaml"),
        ("quickstrt", "did you mean the shipped recipe quickstart.yaml"),
        (3, "3 is not possible here"),
        (["a.yaml"], "write extends: other.yaml"),
        ("mine.yaml", "one level is as deep as it goes"),
    ],
)
def test_what_it_cannot_name(named: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        extended(tmp_path, extends=named)


def test_it_is_found_beside_the_recipe_and_among_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    extended(tmp_path / "deep")
    monkeypatch.chdir(tmp_path)
    assert file.load("deep/mine.yaml", None).train.max_steps == 5
    write(tmp_path / "own.yaml", {"extends": "quickstart", "train": {"max_steps": 3}, "output": {"dir": "r"}})
    assert file.load("own.yaml", None).train.max_steps == 3


def test_settings_come_last_and_the_resolved_recipe_is_complete(tmp_path: Path) -> None:
    extended(tmp_path, train={"max_steps": 7}, output={"dir": "runs/mine"})
    done = ft("sft", "--recipe", "mine.yaml", "--set", "train.max_steps=9", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert "extends" not in shown
    assert shown["train"]["max_steps"] == 9
    assert shown["adapter"]["r"] == 4
    refused = ft("sft", "--recipe", "base.yaml", "--set", "extends=mine.yaml", "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "extends: unknown key → write it at the top of a recipe's file" in refused.stderr


def test_overwrite_does_not_take_what_it_builds_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    write(folder / "adapter" / "base.yaml", BASE)
    write(tmp_path / "mine.yaml", {"extends": "run/adapter/base.yaml", "output": {"dir": str(folder)}})
    done = ft("sft", "--recipe", "mine.yaml", "--overwrite", cwd=tmp_path)
    assert done.returncode == 2
    assert "would be deleted by --overwrite" in done.stderr
    assert (folder / "adapter" / "base.yaml").exists()


def test_editors_take_it(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(json.dumps(file.schema())))
    assert not list(validator.iter_errors({"extends": "base.yaml", "train": {"max_steps": 7}}))
    assert list(validator.iter_errors({"extends": "base.yaml", "trian": {}}))
    assert list(validator.iter_errors({"train": {"max_steps": 7}}))
    assert {*RECIPES} == {*file.schema()["$defs"]["Extending"]["properties"]["stage"]["enum"]}
