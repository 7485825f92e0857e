"""The recipe classes: what a stage may say, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_kit import GOOD, complaint, load

from finetune.errors import UserError
from finetune.recipe import file
from finetune.recipe.resolve import Hardware, batch_layout, resolve
from finetune.recipe.stages import RECIPES


def test_schema_describes_every_key() -> None:
    definitions = file.schema()["$defs"]
    for name, definition in definitions.items():
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key} has no description"
    assert set(RECIPES) == {"pretrain", "sft", "reward", "dpo", "kto", "ppo"}


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.output.dir = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
         "4 x gradient_accumulation_steps 2 is 8, and no effective_batch_size of 16; set effective_batch_size: 8"),
        ({"per_device_train_batch_size": 3}, "batch_size: 3 does not divide effective_batch_size of 16"),
        ({"per_device_train_batch_size": 32}, "32 does not divide"),
        ({"gradient_accumulation_steps": 3}, "steps: 3 does not divide effective_batch_size of 16"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, None),
        ({"gradient_accumulation_steps": 8}, None),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 5}, "5 is no multiple of eval_steps 3"),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 6}, None),
        ({"learning_rate": ".inf"}, "train.learning_rate"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(tmp_path: Path, train: dict[str, object], expected: str | None) -> None:
    settings = [f"train.{key}={value}" for key, value in train.items()] + ["data.eval_split=0.1"]
    if expected is None:
        loaded = load(tmp_path, GOOD, *settings)
        micro, accumulation = batch_layout(loaded.train, loaded.data.max_length, Hardware())
        assert micro * accumulation == loaded.train.effective_batch_size
    else:
        assert expected in complaint(tmp_path, GOOD, *settings)


def test_minibatches_of_ppo_are_counted_alike(tmp_path: Path) -> None:
    text = GOOD.replace("sft", "ppo") + "reward: {functions: [rule.py:score]}\n"
    (tmp_path / "r.yaml").write_text(text)
    sizes = ("train.effective_batch_size=64", "ppo.num_mini_batches=4")
    with pytest.raises(UserError, match=r"32 does not divide effective_batch_size / ppo\.num_mini_batches"):
        file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=32"])
    file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=8"])
    file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=3"])  # the last has one


def test_the_best_model_is_evaluated_where_it_is_saved(tmp_path: Path) -> None:
    best = ("train.load_best_model_at_end=true", "data.eval_split=4")
    for key, other in (("eval_steps", "save_steps"), ("save_steps", "eval_steps")):
        train = resolve(load(tmp_path, GOOD, *best, f"train.{key}=3"), Hardware()).train
        assert getattr(train, other) == 3
    train = resolve(load(tmp_path, GOOD, "train.eval_steps=3", "data.eval_split=4"), Hardware()).train
    assert train.save_steps is None


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("section", ["", "adapter: {}\n", "adapter:\n", "adapter: {r: 8}\n"])
def test_an_adapter_without_a_method_is_the_stages_own(tmp_path: Path, stage: str, section: str) -> None:
    text = GOOD.replace("sft", stage) + section + ("reward: {model: x}\n" if stage == "ppo" else "")
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    if stage == "pretrain" and "r: 8" in section:
        with pytest.raises(UserError, match=r"adapter\.r: unknown key"):
            file.load(str(tmp_path / "r.yaml"), None)
        return
    adapter = file.load(str(tmp_path / "r.yaml"), None).adapter
    assert adapter.method == ("full" if stage == "pretrain" else "lora")
    assert getattr(adapter, "r", 16) == (8 if "r: 8" in section else 16)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("q_proj", ["q_proj"]), ("'q_proj, v_proj'", ["q_proj", "v_proj"]), ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("all-linear", "all-linear"), (r"'.*\.(q|v)_proj'", r".*\.(q|v)_proj"), ("[q_proj]", ["q_proj"]),
    ],
)  # fmt: skip
def test_a_name_as_text_is_that_module(tmp_path: Path, written: str, expected: object) -> None:
    adapter = load(tmp_path, GOOD + f"adapter: {{target_modules: {written}, modules_to_save: lm_head}}\n").adapter
    assert adapter.target_modules == expected
    assert adapter.modules_to_save == ["lm_head"]
