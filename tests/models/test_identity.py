"""A fingerprint is of the weights that are loaded: the same however they are stored, another when anything changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.errors import UserError
from finetune.models import weight_files
from finetune.models.identity import IDENTITY_FILE, check_identity, fingerprint, sampled
from finetune.resources import BUILTIN_MODELS

QWEN = BUILTIN_MODELS / "tiny-qwen"  # tied embeddings
EMBEDDING = "model.embed_tokens.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(QWEN, tmp_path / "copy"))


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_sharded_bin(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    names = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({n: state[n] for n in state if names[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def with_tied_head(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})


def with_files_that_are_not_loaded(folder: Path) -> None:
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "training_state.safetensors"):
        save_file({"x": torch.ones(2)}, folder / name)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"left over from another download")
    (folder / "pytorch_model.bin").write_bytes(b"the same in another format")


SAME = [as_bin, as_sharded_bin, as_shards, with_tied_head, with_files_that_are_not_loaded]


@pytest.mark.parametrize("store", SAME, ids=lambda f: f.__name__)
def test_the_same_weights_however_they_are_stored(copy: Path, store: Callable[[Path], None]) -> None:
    store(copy)
    assert fingerprint(copy) == fingerprint(QWEN)


def rows_flipped(state: Weights) -> None:
    state[EMBEDDING] = state[EMBEDDING].flip(0).contiguous()


def two_rows_swapped(state: Weights) -> None:
    state[EMBEDDING][[501, 502]] = state[EMBEDDING][[502, 501]]


def layers_swapped(state: Weights) -> None:
    a, b = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    state[a], state[b] = state[b], state[a]


def one_value(state: Weights) -> None:
    state[EMBEDDING][777, 3] += 1


def another_precision(state: Weights) -> None:
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float16)


def another_shape(state: Weights) -> None:
    state[EMBEDDING] = state[EMBEDDING].T.contiguous()


def a_head_of_its_own(state: Weights) -> None:
    state["lm_head.weight"] = state[EMBEDDING] * 2


OTHER = [rows_flipped, two_rows_swapped, layers_swapped, one_value, another_precision, another_shape, a_head_of_its_own]


@pytest.mark.parametrize("change", OTHER, ids=lambda f: f.__name__)
def test_other_weights(copy: Path, change: Callable[[Weights], None]) -> None:
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    assert fingerprint(copy) != fingerprint(QWEN)


@pytest.mark.parametrize("shape", ["safetensors", "bin", "consolidated now", "consolidated then"])
def test_adapters_of_earlier_versions_still_know_their_base(copy: Path, tmp_path: Path, shape: str) -> None:
    stray = copy / "consolidated.safetensors"
    if shape == "bin":
        as_bin(copy)
    if shape == "consolidated then":
        save_file({"x": torch.ones(2)}, stray)
    stored = sampled([*copy.glob("*.safetensors")] or copy.glob("*.bin"))
    if shape == "safetensors":  # what the version before computed for this base, by that version
        assert stored == "cf41a1ed86047d4f5a007cef6dbc87e22f0086512dacb43e9bc988d4f47ddd27"
    (tmp_path / IDENTITY_FILE).write_text(json.dumps({"base": "tiny-qwen", "fingerprint": stored}))
    if shape == "consolidated now":
        stray.write_bytes(b"not a safetensors file at all")
    check_identity(tmp_path, copy, "copy")
    with pytest.raises(UserError, match=r"was trained on another base \(tiny-qwen\) than tiny-llama"):
        check_identity(tmp_path, BUILTIN_MODELS / "tiny-llama", "tiny-llama")


def test_it_is_computed_once_while_the_files_stay(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(copy)
    monkeypatch.setattr("finetune.models.identity.tensors", lambda path: pytest.fail("read again"))
    assert fingerprint(copy) == first
    monkeypatch.setattr("finetune.models.identity.tensors", weight_files.tensors)
    save_file({"x": torch.ones(2)}, copy / "model.safetensors")
    assert fingerprint(copy) != first
