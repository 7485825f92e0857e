"""A base with a broken file: one line with its name, before any weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.models import loading, tokenizers
from finetune.recipe.sections import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def config(**keys: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def as_bin(content: bytes | None = None, length: int | None = None) -> Callable[[Path], None]:
    def store(folder: Path) -> None:
        torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()
        whole = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(whole[:length] if content is None else content)

    return store


def index(content: Any) -> Callable[[Path], None]:
    def store(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return store


HALF = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
WEIGHT_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors, no pytorch_model.bin and no index"),
    "cut off": (cut, "model.safetensors: is cut off or no safetensors file"),
    "empty": (put(WEIGHTS, b""), "model.safetensors: is empty"),
    "a pointer": (put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1"), "is a Git LFS pointer"),
    "a shard less": (index(HALF), "model-00002-of-00002.safetensors: named in the index but not there"),
    "no JSON index": (index('{"weight_map": {'), "index.json: is not JSON"),
    "a list for an index": (index([]), "index.json: is JSON, but no mapping"),
    "an empty index": (index({}), "is no index of weights"),
    "an empty .bin": (as_bin(b""), "pytorch_model.bin: is empty"),
    "a cut .bin": (as_bin(length=5000), "pytorch_model.bin: is cut off"),
}
CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (put("config.json", b'{"a": '), "config.json: is not JSON"),
    "empty": (put("config.json", b""), "config.json: is not JSON"),
    "no text": (put("config.json", b"\xff\xfe\x00"), "config.json: is not JSON"),
    "a list": (put("config.json", b"[1]"), "config.json: is JSON, but no mapping"),
    "null": (put("config.json", b"null"), "config.json: is JSON, but no mapping"),
    "no type": (put("config.json", b"{}"), "config.json names no model_type"),
    "unknown type": (config(model_type="wonder"), "'wonder' needs code that comes with the checkpoint"),
    "type is a list": (config(model_type=["llama"]), "is no name"),
    "sizes in words": (config(hidden_size="many"), "cannot be loaded"),
    "no heads": (config(num_attention_heads=0), "cannot be loaded"),
    "heads that do not divide": (config(num_attention_heads=7), "cannot be loaded"),
    "unknown activation": (config(hidden_act="wow"), "cannot be loaded .*wow"),
    "unknown rope": (config(rope_parameters={"rope_type": "magic", "rope_theta": 1.0}), "cannot be loaded .*magic"),
    "unknown dtype": (config(dtype="float17"), "cannot be loaded .*float17"),
}


@pytest.mark.parametrize(
    ("damage", "expected"), [*WEIGHT_FILES.values(), *CONFIGS.values()], ids=[*WEIGHT_FILES, *CONFIGS]
)
def test_weights_and_config(base: Path, tmp_path: Path, damage: Callable[[Path], Any], expected: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    damage(folder)
    model = ModelConfig(name=str(folder), sanity_check=False)
    for look in (loading.skeleton, lambda m: loading.load_model(m, torch.float32)):
        with pytest.raises(UserError, match=expected) as caught:
            look(model)
        assert len(caught.value.lines()) == 1


def test_a_bin_that_is_no_pickle(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    as_bin(b"hello there")(folder)
    with pytest.raises(UserError, match=r"copy: model\.name: "):
        loading.load_model(ModelConfig(name=str(folder), sanity_check=False), torch.float32)


TOKENIZERS = {
    "no JSON": put("tokenizer.json", b'{"version"'), "empty": put("tokenizer.json", b""),
    "an empty mapping": put("tokenizer.json", b"{}"), "settings cut off": put("tokenizer_config.json", b'{"a'),
    "settings a list": put("tokenizer_config.json", b"[]"), "gone": lambda folder: (folder / "tokenizer.json").unlink(),
}  # fmt: skip


@pytest.mark.parametrize("damage", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(base: Path, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError, match="no usable tokenizer") as caught:
        tokenizers.load_tokenizer(ModelConfig(name=str(folder)))
    assert len(caught.value.lines()) == 1
