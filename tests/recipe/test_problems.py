"""What is wrong with a recipe is told with its line, its key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_kit import GOOD, complaint, load


@pytest.mark.parametrize(
    ("section", "key", "advice"),
    [
        ("adapter", "lora_rank", "adapter.r"),
        ("adapter", "lora_target", "adapter.target_modules"),
        ("data", "cutoff_len", "data.max_length"),
        ("data", "sequence_len", "data.max_length"),
        ("data", "sample_packing", "data.packing"),
        ("data", "val_size", "data.eval_split"),
        ("model", "model_name_or_path", "model.name"),
        ("train", "warmup_ratio", "train.warmup_steps"),
        ("train", "micro_batch_size", "train.per_device_train_batch_size"),
        ("train", "learning_ratee", "did you mean learning_rate?"),
        ("train", "max_length", "data.max_length"),
        ("data", "learning_rate", "train.learning_rate"),
    ],
)
def test_unknown_keys_are_translated(tmp_path: Path, section: str, key: str, advice: str) -> None:
    kept = {"model": "name: tiny-llama\n  ", "data": "train: x\n  "}.get(section, "")
    lines = [line for line in GOOD.splitlines() if not line.startswith(section)]
    text = "\n".join([*lines, f"{section}:", f"  {kept}{key}: 1"])
    message = complaint(tmp_path, text)
    assert f"{section}.{key}: unknown key" in message
    assert advice in message
    assert f"line {len(text.splitlines())}" in message
    assert str(tmp_path / "r.yaml") in message


def test_top_level_key_of_another_tool(tmp_path: Path) -> None:
    assert "here it is called adapter.r" in complaint(tmp_path, GOOD + "lora_rank: 8\n")
    assert "here it is called output.dir" in complaint(tmp_path, GOOD + "output_dir: 8\n")


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, GOOD + "train: {learning_rate: fast, seed: x, lr_scheduler_type: cosin}\nfoo: 1\n")
    assert len(message.splitlines()) == 4
    assert "train.learning_rate: 'fast' is not possible here" in message
    assert "did you mean cosine?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nstage: sft\nmodel: {name: [\n", "line"),
        ("version: 1\n\tstage: sft\n", "line 2: not readable as YAML"),
        ("- a\n- b\n", "not a mapping of sections"),
        ("", "not a mapping of sections"),
        (GOOD + "model: {name: other}\n", "line 6: model: key stands twice"),
        (GOOD.replace("stage: sft", "stage: sfft"), "stage: unknown stage 'sfft' → did you mean sft?"),
        (GOOD.replace("stage: sft\n", ""), "stage: missing"),
        (GOOD.replace("version: 1\n", ""), "version: missing → write version: 1"),
        (GOOD.replace("version: 1", "version: 2"), "version: version 2 is not known"),
        (GOOD.replace("stage: sft", "stage: pretrain"), "this is a recipe for `ft pretrain`, not `ft sft`"),
        (GOOD.replace("output: {dir: runs/x}\n", ""), "output: missing"),
        (GOOD + "adapter: {method: lorra}\n", "adapter.method: unknown adapter method 'lorra'"),
        (GOOD + "adapter: {r: 0}\n", "adapter.r: 0 is not possible here"),
        (GOOD + "adapter: {method: bitfit, r: 4}\n", "adapter.r: unknown key → it belongs to another adapter.method"),
        (GOOD + "train: {max_steps: 1.5}\n", "train.max_steps: 1.5 is not possible here"),
        (GOOD + "train: {packing: true}\n", "it belongs into data: data.packing"),
        (
            GOOD + "train: {per_device_train_batch_size: 3, gradient_accumulation_steps: 2}\n",
            "3 x gradient_accumulation_steps 2 is 6, and no effective_batch_size of 16",
        ),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, expected: str) -> None:
    message = complaint(tmp_path, text)
    assert expected in message
    assert str(tmp_path / "r.yaml") in message


@pytest.mark.parametrize("stage", ["[sft]", "{a: 1}", "5", "null"])
def test_a_stage_that_is_no_name(tmp_path: Path, stage: str) -> None:
    assert "stage: " in complaint(tmp_path, GOOD.replace("stage: sft", f"stage: {stage}"))


def test_keys_without_effect_stand_with_their_line(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD + "train:\n  lr_scheduler_type: linear\n  lr_min_ratio: 0.1\n")
    assert "line 8: train.lr_min_ratio: this schedule has no floor → set train.lr_scheduler_type" in said
    assert "--set: train.eval_steps: no rows are held out" in complaint(tmp_path, GOOD, "train.eval_steps=3")
    off = ("train.load_best_model_at_end=false", "train.early_stopping_patience=null", "data.packing=false")
    load(tmp_path, GOOD, *off)  # what is so without them, too
