"""ChatGLM's original layout through the stages: train, go on from a foreign adapter, evaluate, merge to both."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tensors, train, write_rows
from safetensors.torch import load_file, save_file

from finetune.adapters.merge import largest_difference, logits_of
from finetune.commands import evaluate, merge
from finetune.errors import UserError
from finetune.models import loading, tokenizers
from finetune.recipe.sections import ModelConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from chatglm_reference import FIXTURES

CHECKPOINT = FIXTURES / "chatglm3" / "checkpoint"
FOREIGN = FIXTURES / "chatglm3" / "adapter_original"
Recipe = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The recorded checkpoint with a file of published code, which is copied and never run."""
    folder = tmp_path / "chatglm3-6b"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('remote code ran')")
    return folder


def load(folder: Path) -> Any:
    return loading.load_model(ModelConfig(name=str(folder), sanity_check=False), torch.float32)


def samples() -> list[list[int]]:
    ids: list[int] = load_file(FOREIGN / "logits_golden.safetensors")["input_ids"][0].tolist()
    return [ids]


def test_an_adapter_of_the_published_code_is_evaluated_and_merged(source: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "hi"}]}]
    held_out = write_rows(tmp_path / "rows.jsonl", rows)
    model = str(source)
    evaluate.run(
        [], model=model, adapter=str(FOREIGN), data=str(held_out), limit=1, json_file=str(tmp_path / "with.json")
    )
    evaluate.run([], model=model, data=str(held_out), limit=1, json_file=str(tmp_path / "without.json"))
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["runs"][0]["metrics"]["loss"]
              for name in ("with", "without")]  # fmt: skip
    assert abs(losses[0] - losses[1]) > 1e-3

    recorded = load_file(FOREIGN / "logits_golden.safetensors")["logits"][0]
    for layout in ("hf", "chatglm"):
        merge.run(str(FOREIGN), str(tmp_path / layout), model=model, dtype="float32", layout=layout)
        report = json.loads((tmp_path / layout / "merge.json").read_text())
        assert report["format"] == layout
        assert report["max_logit_diff"] < 1e-4 < report["adapter_effect"]
        assert (logits_of(load(tmp_path / layout), samples())[0] - recorded).abs().max() < 1e-4


def test_both_layouts_of_a_run_compute_the_same(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    run = train(recipe(model={"name": str(source)}, train={"max_steps": 3}))
    for layout in ("hf", "chatglm"):
        merge.run(str(run.path), str(tmp_path / layout), layout=layout, dtype="float32")
    stock, original = tmp_path / "hf", tmp_path / "chatglm"
    assert largest_difference(logits_of(load(stock), samples()), logits_of(load(original), samples()))[0] == 0.0

    # The original layout is complete for the published code: its names, config.json, tokenizer and code.
    assert tensors(original).keys() == tensors(source).keys()
    assert json.loads((original / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.model", "tokenizer_config.json", "modeling_chatglm.py"):
        assert (original / name).read_bytes() == (source / name).read_bytes()
    assert not (original / "tokenizer.json").exists()

    # The stock one is for anybody: plain transformers, no code.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, info = AutoModelForCausalLM.from_pretrained(stock, output_loading_info=True, dtype=torch.float32)
    assert type(plain).__name__ == "GlmForCausalLM"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not list(stock.glob("*.py"))
    text = "philosophy 你好"
    ours = tokenizers.load_tokenizer(ModelConfig(name=str(source)))
    assert AutoTokenizer.from_pretrained(stock)(text)["input_ids"] == ours(text)["input_ids"]


def test_there_and_back_is_bit_equal(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    """Merging an adapter that does nothing gives the checkpoint back, bit for bit."""
    run = train(recipe(model={"name": str(source)}, train={"max_steps": 1}))
    weights = load_file(run.adapter / "adapter_model.safetensors")
    nothing = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in weights.items()}
    save_file(nothing, run.adapter / "adapter_model.safetensors", {"format": "pt"})
    merge.run(str(run.path), str(tmp_path / "back"), layout="chatglm")
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_going_on_from_a_foreign_adapter(recipe: Recipe, source: Path) -> None:
    run = train(recipe(model={"name": str(source), "adapter": str(FOREIGN)}, train={"max_steps": 2}))
    assert (run.adapter / "adapter_model.safetensors").is_file()
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]


def test_layouts_that_cannot_be(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    run = train(recipe(train={"max_steps": 1}))
    with pytest.raises(UserError, match=r"--format: is not in ChatGLM's original layout"):
        merge.run(str(run.path), str(tmp_path / "out"), layout="chatglm")
    with pytest.raises(UserError, match="unknown format 'onnx'"):
        merge.run(str(run.path), str(tmp_path / "out"), layout="onnx")
    assert not (tmp_path / "out").exists()
