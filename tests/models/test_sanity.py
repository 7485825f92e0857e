"""A wrong mapping is caught right after loading: the model cannot copy a list it has just read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import families_tiny as tiny
import pytest
import torch
from conftest import train
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.models import loading, sanity, sources, tokenizers
from finetune.recipe.sections import ModelConfig

State = dict[str, torch.Tensor]
BASES = sources.builtin_names()


def swap(first: str, second: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in [name for name in state if first in name]:
            other = name.replace(first, second)
            state[name], state[other] = state[other], state[name]

    return change


def interleave(state: State) -> None:
    """The rows of q and k as another kind of rotary embedding wants them."""
    for name in state:
        if ".q_proj." in name or ".k_proj." in name:
            heads = state[name].view(-1, 64, *state[name].shape[1:])
            state[name] = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(state[name].shape)


def forget_head_and_table(state: State) -> None:
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0)


def without_second_layer(state: State) -> None:
    for name in state:
        if ".layers.1." in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name] = torch.zeros_like(state[name])


MISTAKES: dict[str, Callable[[State], None]] = {
    "gate and up swapped": swap("gate_proj", "up_proj"),
    "q and k swapped": swap("q_proj", "k_proj"),
    "k and v swapped": swap("k_proj", "v_proj"),
    "another rotary embedding": interleave,
    "the vocabulary shifted by one": forget_head_and_table,
    "a layer left out": without_second_layer,
}


@pytest.mark.parametrize("name", BASES)
def test_built_in_bases_are_far_below_guessing(name: str) -> None:
    model = ModelConfig(name=name, sanity_check=True)
    loaded = loading.load_model(model, torch.float32)
    loss = sanity.copying_loss(loaded, tokenizers.load_tokenizer(model))
    assert loss < 0.3 * math.log(loaded.config.vocab_size)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_mappings_are_caught(mistake: str, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(sources.locate(ModelConfig(name="tiny-llama")), folder)
    state = load_file(folder / "model.safetensors")
    MISTAKES[mistake](state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"copies a list .* model\.sanity_check: false") as caught:
        loading.load_model(ModelConfig(name=str(folder), sanity_check=True), torch.float32)
    assert len(caught.value.lines()) == 1


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("sanity") / "random", "llama")


def test_small_random_models_are_only_warned_about(random_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loading.load_model(ModelConfig(name=str(random_model)), torch.float32)
    shown = capsys.readouterr().err
    assert "copies a list it has just read with a loss of" in " ".join(shown.split())
    assert "model.sanity_check" in shown


def test_large_ones_are_an_error(random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanity, "SMALL", 1000)
    with pytest.raises(UserError, match="untrained, damaged, or loaded wrongly"):
        loading.load_model(ModelConfig(name=str(random_model)), torch.float32)


def test_switched_off_in_a_recipe(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = train(recipe(train={"max_steps": 1}), "model.sanity_check=off")  # YAML's off is false
    assert "copies a list" not in capsys.readouterr().err
    assert json.loads((run.adapter / "base_identity.json").read_text())["sanity_check"] is False


def test_nan_is_no_language_model(random_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(random_model, folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="a loss of nan"):
        loading.load_model(ModelConfig(name=str(folder), sanity_check=True), torch.float32)


def test_a_tokenizer_with_more_tokens_than_the_model(random_model: Path, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "short", "llama", vocab_size=100)
    with pytest.raises(UserError, match="tokenizer has ids up to"):
        loading.load_model(ModelConfig(name=str(folder), sanity_check=True), torch.float32)
