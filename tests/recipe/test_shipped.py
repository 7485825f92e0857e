"""The recipes that come with the package, and the schema beside them."""

from __future__ import annotations

import json

import pytest
import yaml

from finetune.recipe import file, reading
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.stages import RECIPES

SHIPPED = reading.shipped()


def test_schema_beside_the_recipes_is_current() -> None:
    """Editors read it; `ft recipes schema > recipes/ft-recipe.schema.json` writes it."""
    path = next(iter(SHIPPED.values())).parent / "ft-recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == file.schema()


def test_number_of_shipped_recipes() -> None:
    assert len(SHIPPED) == 46


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads(name: str) -> None:
    text = SHIPPED[name].read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    first, second = text.splitlines()[:2]
    assert second == "# $schema: ft-recipe.schema.json"
    assert first.startswith(f"# ft {values['stage']} --recipe {name}  "), (
        "headed by its command and the hardware it needs"
    )
    recipe = file.load(name, RECIPES[values["stage"]])
    resolve(recipe, Hardware())
    if "config" not in values["model"]:
        assert 7 <= len(text.splitlines()) <= 25


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("pretrain")])
def test_shipped_recipe_fits_a_run_of_any_length(name: str) -> None:
    """`--set data.train=mine.json`, `--set train.max_steps=5`: the warm-up is a share, and no more than the run."""
    stage = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))["stage"]
    assert file.load(name, RECIPES[stage]).train.warmup_steps < 1
