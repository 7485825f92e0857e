"""What a run reads, by content: every part of it counts, and so does where one part ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_rows

from finetune.recipe.stages import PpoRecipe
from finetune.training.inputs import digest, known_inputs


def test_a_digest_knows_where_parts_end() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest(["abc"])
    assert digest(["ab", b"c"]) == digest([b"ab", "c"])
    assert digest(["\ud800"]) != digest(["?"]), "what no file of UTF-8 holds"


@pytest.fixture
def known(tmp_path: Path) -> Any:
    """The digests of a recipe of PPO that names everything a recipe can name; all of it lies in tmp_path."""
    for name in ("train", "eval", "eval 2", "pairs"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    for name in ("policy", "reward"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
    for name in ("rule.py", "metric.py"):
        (tmp_path / name).write_text("")
    recipe = PpoRecipe.model_validate(
        {
            "version": 1, "stage": "ppo", "model": {"name": "base", "adapter": str(tmp_path / "policy")},
            "data": {"train": str(tmp_path / "train.jsonl")},
            "eval": {"data": {"x": str(tmp_path / "eval.jsonl"), "y": str(tmp_path / "eval 2.jsonl")},
                     "during": {"metrics": ["exact_match", f"{tmp_path / 'metric.py'}:f"]}},
            "output": {"dir": "out"},
            "reward": {"model": str(tmp_path / "reward"), "functions": [f"{tmp_path / 'rule.py'}:f"]},
        }
    )  # fmt: skip
    both = recipe.reward.model_copy(update={"train": str(tmp_path / "pairs.jsonl")})  # which no recipe file may say
    recipe = recipe.model_copy(update={"reward": both})
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0})
    base: Any = SimpleNamespace(tokenizer=tokenizer, fingerprint="f", model=SimpleNamespace(is_new=False))
    return lambda template="t": known_inputs(recipe, base, template, resume=False)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("train.jsonl", "data.train"), ("eval.jsonl", "eval.data"), ("eval 2.jsonl", "eval.data"),
        ("policy/adapter_config.json", "model.adapter"),
        ("policy/adapter_model.safetensors", "model.adapter"), ("pairs.jsonl", "reward.train"),
        ("reward/adapter_model.safetensors", "reward.model"), ("rule.py", "reward.functions"),
        ("metric.py", "eval.during.metrics"),
    ],
)  # fmt: skip
def test_one_file_is_one_key(known: Any, tmp_path: Path, file: str, key: str) -> None:
    before = known()
    data = {"data.train", "eval.data", "eval.during.metrics", "reward.train", "reward.model", "reward.functions"}
    assert before.keys() == {"model.name", "model.chat_template", "model.adapter"} | data
    assert known() == before
    with (tmp_path / file).open("a") as stream:
        stream.write(" ")
    assert {name for name, value in known().items() if value != before[name]} == {key}
    assert {name for name, value in known("u").items() if value != before[name]} == {key, "model.chat_template"}
