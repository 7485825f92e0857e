"""A resolved recipe is complete: run again, it gives the same run from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_kit import GOOD, load

from finetune.recipe import file, reading
from finetune.recipe.resolve import Hardware, batch_layout, compute_dtype, resolve
from finetune.recipe.stages import SftRecipe


def test_resolve_is_complete_and_stable(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    machine = Hardware("cpu", True, 24.0)
    resolved = resolve(recipe, machine)
    assert Path(resolved.output.dir).is_absolute()
    assert resolved.model.dtype == "bfloat16"
    assert resolve(resolved, machine) == resolved
    again = tmp_path / "resolved.yaml"
    again.write_text(file.to_yaml(resolved), encoding="utf-8")
    assert file.load(str(again), SftRecipe) == resolved


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (Hardware("cuda", True), "bfloat16"),
        (Hardware("cuda", False), "float16"),  # T4, V100
        (Hardware("cpu", True), "bfloat16"),
        (Hardware("cpu", False), "float32"),
        (Hardware("mps", False), "float32"),
    ],
)
def test_precision_follows_the_hardware(hardware: Hardware, dtype: str) -> None:
    assert compute_dtype("auto", hardware) == dtype
    assert compute_dtype("float32", hardware) == "float32"


@pytest.mark.parametrize("effective", [1, 5, 16, 24, 60])
@pytest.mark.parametrize("max_length", [64, 2048, 32768])
@pytest.mark.parametrize("processes", [1, 4])
def test_batch_layout_keeps_the_effective_size(tmp_path: Path, effective: int, max_length: int, processes: int) -> None:
    train = load(tmp_path, GOOD, f"train.effective_batch_size={effective}").train
    micro, accumulation = batch_layout(train, max_length, Hardware("cuda", True, 24.0, processes))
    assert micro * accumulation == max(1, effective // processes)


def test_a_resolved_recipe_can_be_run_again(tmp_path: Path) -> None:
    """It holds every default, less those that do nothing beside its other keys."""
    for name in reading.shipped():
        recipe = resolve(file.load(name, None), Hardware())
        text = file.to_yaml(recipe)
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        again = resolve(file.load(str(tmp_path / "again.yaml"), None), Hardware())
        assert file.to_yaml(again) == text
        assert again == recipe


def test_held_out_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve(load(tmp_path, GOOD + "eval: {data: 'test*.jsonl'}\n"), Hardware())
    assert recipe.eval.data == str(tmp_path / "test*.jsonl")
    (tmp_path / "a.jsonl").touch()
    sets = "{own: a.jsonl, old: {path: a.jsonl, general: true}}"
    again = resolve(load(tmp_path, GOOD + f"eval: {{data: {sets}}}\n"), Hardware())
    assert again.eval.sets == [("own", str(tmp_path / "a.jsonl"), False), ("old", str(tmp_path / "a.jsonl"), True)]
    assert resolve(again, Hardware()) == again


def test_names_of_a_hub_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = GOOD.replace("name: tiny-llama", "name: owner/x, source: modelscope")
    recipe = resolve(load(tmp_path, text, "data.train={path: owner/x, source: modelscope}"), Hardware())
    assert recipe.model.name == "owner/x"
    assert recipe.data.train[0].path == "owner/x"  # type: ignore[union-attr]
