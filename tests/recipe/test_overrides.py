"""--set: one flag changes the method, null is the default, messages name no installed place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_kit import GOOD, complaint
from recipe_kit import load as of_text

from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS, LoraAdapter
from finetune.recipe.file import load
from finetune.recipe.stages import PpoRecipe, RewardRecipe, SftRecipe


def test_overrides(tmp_path: Path) -> None:
    recipe = of_text(
        tmp_path, GOOD, "train.learning_rate=2e-4", "adapter.r=4", "adapter.target_modules=[q_proj, v_proj]"
    )
    assert recipe.train.learning_rate == 2e-4
    assert recipe.adapter.method == "lora"
    assert recipe.adapter.r == 4
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert "--set: train.learning_rat: unknown key" in complaint(tmp_path, GOOD, "train.learning_rat=1")
    assert "not of the form key=value" in complaint(tmp_path, GOOD, "train.learning_rate")
    assert "stage is not a section" in complaint(tmp_path, GOOD, "stage.x=1")


def said(reference: str, kind: Any, *overrides: str) -> tuple[Any, list[str]]:
    lines: list[str] = []
    return load(reference, kind, overrides, say=lines.append), lines


@pytest.mark.parametrize("method", [name for name in ADAPTERS if name != "lora"])
@pytest.mark.parametrize("reference", ["quickstart", "dora_llama", "pissa_llama"])
def test_one_flag_changes_the_method(method: str, reference: str) -> None:
    """Any method on any recipe: what belongs to the recipe's own method is left out and named, the rest is the same."""
    recipe, lines = said(reference, SftRecipe, f"adapter.method={method}")
    assert recipe.adapter.method == method
    assert len(lines) == 1
    assert "r, " in lines[0]
    assert recipe.adapter.model_dump()["method"] == method
    assert recipe.train == load(reference, SftRecipe).train


def test_keys_that_mean_the_same_stay(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "version: 1\nstage: sft\nmodel: {name: tiny-llama}\ndata: {train: builtin:tickets/train}\noutput: {dir: x}\n"
        "adapter: {method: lora, r: 4, lora_dropout: 0.1, target_modules: [q_proj]}\n"
    )
    vera, lines = said(str(path), SftRecipe, "adapter.method=vera")
    assert vera.adapter.r == 256
    assert vera.adapter.target_modules == ["q_proj"]
    assert lines == ["adapter.method=vera: left out r, lora_dropout, which belong to lora"]
    adalora, _ = said(str(path), SftRecipe, "adapter.method=adalora")
    assert adalora.adapter.lora_dropout == 0.1
    with pytest.raises(UserError, match="belongs to another"):  # what was set is never left out
        said(str(path), SftRecipe, "adapter.method=bitfit", "adapter.r=8")


KEYS = ("reward.train", "reward.learning_rate", "reward.num_train_epochs")


@pytest.mark.parametrize("reference", ["ppo_llama", "ppo_qwen", "ppo_chatglm3"])
def test_one_flag_changes_what_scores(reference: str) -> None:
    """`ft reward` says to go on with `--set reward.model=…`: the pairs of the recipe, and how to train on them, go."""
    recipe, lines = said(reference, PpoRecipe, "reward.model=runs/reward")
    assert (recipe.reward.model, recipe.reward.train) == ("runs/reward", None)
    assert lines == [f"left out {', '.join(KEYS)} of the recipe, for another reward takes its place"]
    alone, _ = said(reference, PpoRecipe, "reward.train=null", "reward.functions=[rules.py:polite]")
    assert (alone.reward.train, alone.reward.functions) == (None, ["rules.py:polite"])
    beside, lines = said(reference, PpoRecipe, "reward.functions=[rules.py:polite]")
    assert beside.reward.train is not None  # several sources are added up
    assert lines == []
    with pytest.raises(UserError, match="excludes"):  # what was set is never left out
        said(reference, PpoRecipe, "reward.model=a", "reward.train=b.jsonl")
    with pytest.raises(UserError, match="no reward model is trained"):
        said(reference, PpoRecipe, "reward.model=a", "reward.learning_rate=1e-3")


def test_pairs_instead_of_a_reward_model() -> None:
    recipe, lines = said("align_ppo", PpoRecipe, "reward.train=builtin:tickets/pairs_train")
    assert (recipe.reward.model, recipe.reward.train) == (None, "builtin:tickets/pairs_train")
    assert lines == ["left out reward.model of the recipe, for another reward takes its place"]


def test_own_data_and_the_held_out_rows_of_the_recipe() -> None:
    """`ft eval` of such a run would ask for tickets, which it has not learned."""
    (line,) = said("quickstart", SftRecipe, "data.train=mine.json")[1]
    assert "builtin:tickets/test" in line
    assert "--set data.eval_split=0.05" in line
    for more in ("eval.data=other.json", "eval.data=null", "data.train=builtin:tickets/train"):
        assert said("quickstart", SftRecipe, "data.train=mine.json", more)[1] == []


def test_null_means_the_default_where_it_is_no_value() -> None:
    recipe, _ = said("quickstart", SftRecipe, "adapter.r=null", "train.max_grad_norm=null", "data.eval_split=null")
    assert recipe.adapter.r == LoraAdapter().r
    assert recipe.train.max_grad_norm == 1.0
    assert recipe.data.eval_split is None
    reward, _ = said("align_reward", RewardRecipe, "reward.center_rewards_coefficient=null")
    assert reward.reward.center_rewards_coefficient is None  # here null is a value
    with pytest.raises(UserError, match="unknown key"):
        said("quickstart", SftRecipe, "adapter.rank=null")


def test_a_shipped_recipe_is_named_not_its_place() -> None:
    with pytest.raises(UserError) as caught:
        said("quickstart", SftRecipe, "adapter.method=bitfit", "adapter.r=8")
    assert "site-packages" not in str(caught.value)
    with pytest.raises(UserError, match=r"^shipped recipe quickstart.yaml, line 4: stage") as caught:
        load("quickstart", RewardRecipe)
