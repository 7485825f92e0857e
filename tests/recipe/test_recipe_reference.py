"""The reference of recipe keys: complete, true to the classes, and the file in docs/ is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ft

from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS, LoraAdapter
from finetune.recipe.foreign_keys import ADVICE, FOREIGN_KEYS
from finetune.recipe.reference import ORDER, REQUIRED, document, explain, keys
from finetune.recipe.sections import TrainConfig
from finetune.recipe.stages import RECIPES


def test_every_field_of_every_section_is_a_key() -> None:
    names = {key.name for key in keys()}
    assert {f"train.{field}" for field in TrainConfig.model_fields} <= names
    for section in ADAPTERS.values():
        assert {f"adapter.{field}" for field in section.model_fields} <= names
    for kind in RECIPES.values():
        assert set(kind.model_fields) <= set(ORDER)
    assert {"model.rope_scaling.factor", "data.train.weight", "ppo.kl_coef", "reward.margin", "output.dir"} <= names


def test_defaults_limits_and_scope_are_those_of_the_classes() -> None:
    found = {(key.name, *key.methods): key for key in keys()}
    assert found["adapter.r", "lora"].default == LoraAdapter().r
    assert found["adapter.r", "vera"].default == 256
    assert found["output.dir",].default is REQUIRED
    assert found["train.learning_rate",].values == "number > 0"
    assert found["model.quantization",].values == "int8 | int4"
    assert found["model.config",].scope == "stage pretrain"
    assert found["data.packing",].scope == ""
    assert [key.shown_default for key in keys() if key.name == "train.warmup_steps"] == ["0.03", "0.0"]
    assert all(key.description for key in keys()), [key.name for key in keys() if not key.description]


def test_explain() -> None:
    assert explain("data.packing")[0].startswith("data.packing: true | false   default: false")
    assert explain("packing") == explain("data.packing")
    assert len([line for line in explain("adapter.r") if "whole number" in line]) == 4
    assert any(line.startswith("data.max_length ") for line in explain("data"))
    assert explain("load_in_4bit") == ["load_in_4bit is another tool's key: write model: {quantization: int4}"]
    assert explain("lora_rank") == ["lora_rank is another tool's key: here it is called adapter.r"]
    assert {line.split()[0] for line in explain(None)} == {key.name for key in keys()}
    with pytest.raises(UserError, match=r"did you mean data\.packing"):
        explain("data.packng")


def test_other_tools_keys_lead_to_keys_that_exist() -> None:
    names = {key.name for key in keys()}
    assert set(FOREIGN_KEYS.values()) <= names
    assert not set(ADVICE) & set(FOREIGN_KEYS)


def test_the_document_is_current() -> None:
    written = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == document(), "run: ft recipes explain --markdown > docs/recipe.md"


def test_commands(tmp_path: Path) -> None:
    shown = ft("recipes", "explain", "packing", cwd=tmp_path)
    assert shown.returncode == 0
    assert "into one row of max_length tokens" in shown.stdout
    unknown = ft("recipes", "explain", "packng", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "did you mean data.packing?" in unknown.stderr
    wrong = ft("sft", "--recipe", "quickstart", "--set", "train.wandb_project=x", "--dry-run", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "train.wandb_project: unknown key → write train: {report_to: [wandb]}" in wrong.stderr
