"""What a run reads, by content: every part of it counts, and so does where one part ends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import write_rows

from finetune.training.inputs import digest, known_inputs


def test_a_digest_knows_where_parts_end() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest(["abc"])
    assert digest(["ab", b"c"]) == digest([b"ab", "c"])
    assert digest(["\ud800"]) != digest(["?"]), "what no file of UTF-8 holds"


@pytest.fixture
def known(tmp_path: Path) -> Any:
    """The digests of a recipe whose files lie in tmp_path, and a way to change them."""
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(adapter=str(tmp_path / "adapter")),
        data=SimpleNamespace(train=str(tmp_path / "train.jsonl")),
        eval=SimpleNamespace(data=str(tmp_path / "eval.jsonl")),
    )
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0})
    base: Any = SimpleNamespace(tokenizer=tokenizer, fingerprint="f", model=SimpleNamespace(is_new=False))
    return lambda template="t": known_inputs(recipe, base, template, resume=False)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("train.jsonl", "data.train"), ("eval.jsonl", "eval.data"), ("adapter/adapter_config.json", "model.adapter"),
        ("adapter/adapter_model.safetensors", "model.adapter"),
    ],
)  # fmt: skip
def test_one_file_is_one_key(known: Any, tmp_path: Path, file: str, key: str) -> None:
    before = known()
    assert before.keys() == {"model.name", "model.chat_template", "data.train", "eval.data", "model.adapter"}
    assert known() == before
    with (tmp_path / file).open("a") as stream:
        stream.write(" ")
    assert {name for name, value in known().items() if value != before[name]} == {key}
    assert {name for name, value in known("u").items() if value != before[name]} == {key, "model.chat_template"}
