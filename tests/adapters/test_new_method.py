"""A PEFT method is a section of the recipe and a row: with them a toy trains, is saved, measured, merged, continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import tensors, train
from pydantic import Field

from finetune.adapters import configs, methods
from finetune.adapters.methods import METHODS, Method
from finetune.commands import evaluate, merge
from finetune.errors import UserError
from finetune.recipe import adapters, stages
from finetune.recipe.adapters import LoraAdapter, TargetedAdapter
from finetune.recipe.sections import Count
from finetune.recipe.stages import RECIPES, SftRecipe


class ToyAdapter(TargetedAdapter):
    """peft's Householder reflections, for which there is no section."""

    method: Literal["hra"] = "hra"
    r: Count = 4


class ToyRecipe(SftRecipe):
    adapter: Annotated[LoraAdapter | ToyAdapter, Field(discriminator="method")] = LoraAdapter()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.ADAPTERS, "hra", ToyAdapter)
    monkeypatch.setitem(RECIPES, "sft", ToyRecipe)
    monkeypatch.setattr(stages, "SftRecipe", ToyRecipe)
    row = Method(ToyAdapter, configs.plain("HRAConfig"), not_quantizable=("of the toy", "do not"))
    monkeypatch.setitem(METHODS, "hra", row)


def losses(*runs: Path, data: Path, file: Path, **options: Any) -> list[float]:
    evaluate.run([str(run) for run in runs], data=str(data), limit=4, json_file=str(file), **options)
    return [run["metrics"]["loss"] for run in json.loads(file.read_text())["runs"]]


@pytest.mark.usefixtures("toy")
def test_a_method_is_one_row(recipe: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    first = train(recipe(eval={"max_new_tokens": 2}, train={"max_steps": 2}), "adapter.method=hra", "adapter.r=2")
    assert json.loads((first.adapter / "adapter_config.json").read_text())["peft_type"] == "HRA"
    assert {"hra_u" in name for name in tensors(first.adapter)} == {True}
    merge.run(str(first.path), str(tmp_path / "merged"))
    found = losses(first.path, tmp_path / "merged", data=rows, file=tmp_path / "eval.json", compare_base=True)
    base, *_, tuned, merged = found
    assert abs(tuned - base) > 5e-3
    assert merged == pytest.approx(tuned, abs=1e-3)  # both are rounded to bfloat16

    path = recipe(model={"adapter": str(first.path)}, train={"max_steps": 2}, output={"dir": str(tmp_path / "second")})
    path.write_text(path.read_text().replace("adapter:\n  lora_alpha: 8\n  method: lora\n  r: 4\n", ""))
    second = train(path)
    assert losses(second.path, data=rows, file=tmp_path / "eval.json") != [tuned]
    with pytest.raises(UserError, match=r"model.quantization: of the toy → do not"):
        train(recipe(), "adapter.method=hra", "model.quantization=int8")


def test_every_row_says_what_its_adapters_are() -> None:
    """Sections and rows are the same methods; peft's name of each is the method's, in upper case."""
    assert METHODS.keys() == adapters.ADAPTERS.keys()
    assert all(row.section is adapters.ADAPTERS[name] for name, row in METHODS.items())
    assert methods.of("LORA") is METHODS["lora"]
    assert methods.of("SOMETHING") is METHODS["other"]
    from test_methods import make

    model, small = make("llama"), {"oft": {"oft_block_size": 16}, "bitfit": {"bias": "add"}}
    for name, row in METHODS.items():
        if row.make_config is not None:
            config = row.make_config(model, row.section.model_validate({"method": name, **small.get(name, {})}))
            assert str(config.peft_type.value) == name.upper()
            assert methods.of(config.peft_type) is row
            assert bool(row.virtual_tokens) == config.is_prompt_learning
