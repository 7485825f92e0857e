"""The model card: complete, without somebody's paths, and its Python lines run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.resources import BUILTIN_MODELS
from finetune.training.model_card import card, licence_of

RESULT: dict[str, Any] = {
    "trainable_parameters": 221184, "total_parameters": 2041536, "steps": 1282, "train_loss": 0.12345,
    "eval": {"loss": 0.5, "loss_ci": [0.4, 0.6]},
}  # fmt: skip


def recipe(**sections: Any) -> dict[str, Any]:
    return {
        "stage": "sft",
        "model": {"name": "tiny-llama", "quantization": None},
        "data": {"train": ["/home/somebody/rows.jsonl", "builtin:tickets/train"], "eval_split": 0.05},
        "adapter": {"method": "lora", "r": 16, "modules_to_save": None},
        "train": {"learning_rate": 2e-4},
        "eval": {"data": None},
        "output": {"dir": "/home/somebody/runs/mine"},
        **sections,
    }


def test_card() -> None:
    text = card(recipe(), RESULT, "tiny-llama", "apache-2.0")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "tiny-llama", "license": "apache-2.0", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["ft", "sft", "lora"],
    }  # fmt: skip
    assert "# mine\n" in body
    assert "rows.jsonl, builtin:tickets/train" in body
    assert "221,184 of 2,041,536 parameters (10.83%), 1,282 steps, learning rate 0.0002" in body
    assert "| loss | 0.5 [0.4, 0.6] |" in body
    assert "0.05 of the training data" in body
    for wrong in ("None", "somebody", "More Information Needed"):
        assert wrong not in text


def test_several_held_out_sets_are_named_without_somebody_s_home() -> None:
    sets = {"zh": "/home/somebody/zh.jsonl", "old": {"path": "/home/somebody/mmlu", "general": True}}
    data = {"train": "x.jsonl", "eval_split": None}
    assert "| held-out data | zh.jsonl, mmlu |" in card(recipe(eval={"data": sets}, data=data), RESULT, "b", None)


def test_a_licence_that_nobody_names_is_said_to_be_unknown() -> None:
    text = card(recipe(), RESULT, "owner/base", None)
    assert "not stated in the base's files" in text
    assert "license:" not in text


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n# A base\n", "mit"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "qwen"),
        ("# no head\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\nnot closed", None),
        ("", None),
    ],
)
def test_licence_of_a_base(readme: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    assert licence_of("owner/base", tmp_path) == licence


def test_licence_without_a_card(tmp_path: Path) -> None:
    assert licence_of("owner/base", tmp_path) is None
    assert licence_of("tiny-llama", BUILTIN_MODELS / "tiny-llama") == "apache-2.0"


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_own_methods_are_made_known_first(method: str) -> None:
    text = card(recipe(adapter={"method": method}), RESULT, "owner/base", None)
    assert ("import finetune\n" in text) == (method == "bitfit")
    assert ("finetune.register()" in text) == (method == "bitfit")
    assert 'AutoModelForCausalLM.from_pretrained("owner/base")' in text


def test_other_kinds() -> None:
    assert "num_labels=1" in card(recipe(stage="reward"), RESULT, "owner/base", None)
    full = card(recipe(adapter={"method": "full"}), RESULT, "owner/base", None)
    assert "PeftModel" not in full
    assert "ft chat" in card(recipe(), RESULT, "owner/base", None, original_layout="ChatGLM")
    for where in ({"original_layout": "ChatGLM"}, {"gguf": True}):
        scores = card(recipe(stage="reward"), RESULT, "owner/base", None, **where)
        assert "ft eval RUN --reward ." in scores
        assert "ft chat" not in scores
