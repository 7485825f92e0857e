"""A family with a layout of its own, and an export format, are a row each: loaded, trained, merged in it, proven."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, tensors, train
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.commands import merge
from finetune.errors import RunError, UserError
from finetune.families import FAMILIES, Family
from finetune.models import rope
from finetune.models.export import FORMATS, Format, load_in_layout
from finetune.models.layouts import LAYOUTS, Layout
from finetune.recipe.sections import ModelConfig

MINE = {"model.": "toy.", "lm_head.": "toy_head."}
WIDTHS = {"width": "hidden_size", "inner": "intermediate_size", "depth": "num_hidden_layers"}


def toy_network(model: ModelConfig, config: dict[str, Any]) -> LlamaConfig:
    if "width" not in config:
        raise UserError("has no width", path=model.name)
    found = LlamaConfig(**{WIDTHS.get(key, key): value for key, value in config.items() if key != "model_type"})
    rope.apply(found, model.rope_scaling, model.name)
    return found


def toy_weights(model: ModelConfig, network: LlamaConfig, dtype: torch.dtype, **_: Any) -> LlamaForCausalLM:
    state = renamed(load_file(Path(model.name) / "model.safetensors"), {new: old for old, new in MINE.items()})
    loaded = LlamaForCausalLM(network).to(dtype).eval()
    loaded.load_state_dict(state)
    return loaded


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    beginning = {name: next(old for old in names if name.startswith(old)) for name in state}
    return {names[old] + name.removeprefix(old): state[name] for name, old in beginning.items()}


def write_toy(merged: Any, tokenizer: Any, base: Path, out: Path, max_shard_size: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in merged.state_dict().items()}
    save_file(renamed(state, MINE), out / "model.safetensors", {"format": "pt"})
    shutil.copy(base / "config.json", out)
    tokenizer.save_pretrained(out)


@pytest.fixture
def toy(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random Llama under other names, and the rows that make it a family."""
    folder = tmp_path / "toy"
    shutil.copytree(base, folder)
    save_file(renamed(load_file(base / "model.safetensors"), MINE), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    kept = ("vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
            "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip
    own = {key: config[theirs] for key, theirs in WIDTHS.items()} | {key: config[key] for key in kept}
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **own}))
    monkeypatch.setitem(FAMILIES, "toy", Family("Toy", positions="learned", layout="toy"))
    monkeypatch.setitem(LAYOUTS, "toy", Layout(toy_network, toy_weights))
    monkeypatch.setitem(FORMATS, "toy", Format(write_toy, load_in_layout, stock=False))
    return folder


def test_a_family_and_a_format_are_a_row_each(toy: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = train(recipe(model={"name": str(toy)}, train={"max_steps": 2}))
    assert "In Toy's original layout" in (run.adapter / "README.md").read_text()
    merge.run(str(run.path), str(tmp_path / "merged"), layout="toy", dtype="float32")
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["format"] == "toy"
    assert report["max_logit_diff"] < 1e-4 < 1e-2 < report["adapter_effect"]
    assert "from transformers" not in (tmp_path / "merged" / "README.md").read_text()
    before, after = tensors(toy), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert not torch.equal(before["toy.layers.0.mlp.up_proj.weight"], after["toy.layers.0.mlp.up_proj.weight"])
    again = {"model": {"name": str(tmp_path / "merged")}, "output": {"dir": str(tmp_path / "again")}}
    assert train(recipe(train={"max_steps": 1}, **again)).adapter.is_dir()
    merge.run(str(run.path), str(tmp_path / "stock"))  # in any other format, too
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    state = renamed(plain.state_dict(), MINE)
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())


def test_what_its_rows_say_is_asked(toy: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    said = ft("merge", "nowhere", "--output", tmp_path / "merged", "--format", "onnx").stderr
    assert "one of hf, chatglm, toy" in said
    rounded = recipe(model={"name": str(toy), "quantization": "int4"}, adapter={"init_lora_weights": "loftq"})
    with pytest.raises(UserError, match="Toy's original layout has other names"):
        train(rounded)
    short = {**json.loads((toy / "config.json").read_text()), "max_position_embeddings": 20}
    (toy / "config.json").write_text(json.dumps(short))
    path = recipe(model={"name": str(toy)})
    with pytest.raises(UserError, match="this model has 20 positions"):  # a table, where Llama is only warned of
        train(path)
    (toy / "config.json").write_text(json.dumps({"model_type": "toy"}))
    with pytest.raises(UserError, match="has no width"):
        train(path)


def test_a_format_that_writes_something_else_is_refused(
    toy: Path, recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(merged: Any, *arguments: Any) -> None:
        merged.model.layers[0].mlp.up_proj.weight.data[0] = 0
        write_toy(merged, *arguments)

    monkeypatch.setitem(FORMATS, "toy", Format(write, load_in_layout))
    run = train(recipe(model={"name": str(toy)}, train={"max_steps": 1}))
    with pytest.raises(RunError, match="1 of 21 tensors are not"):
        merge.run(str(run.path), str(tmp_path / "merged"), layout="toy")
    assert not (tmp_path / "merged").exists()
