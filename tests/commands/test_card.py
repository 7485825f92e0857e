"""What a run leaves for others: a model card whose lines run, and files that may be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import train, write_rows

from finetune.commands import merge, reward
from finetune.places import as_umask
from finetune.recipe.file import load
from finetune.recipe.stages import RewardRecipe
from finetune.run.directory import Run

PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def umask() -> Iterator[int]:
    """Another one than the usual."""
    before = os.umask(0o027)
    yield 0o640
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's Python lines make, run where the card is."""
    (code,) = PYTHON.findall((folder / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(folder)
    values: dict[str, Any] = {}
    exec(code, values)
    return values


def checked_card(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    for wrong in ("None", "More Information Needed", str(folder.parents[1]), "nan"):
        assert wrong not in text
    return text


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_the_card_of_a_run(
    method: str, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    path = recipe(
        model={"name": "tiny-llama"}, train={"max_steps": 2, "per_device_eval_batch_size": 1},
        data={"eval_split": 12},
    )  # fmt: skip
    run = train(path, *([] if method == "lora" else [f"adapter.method={method}"]))
    folder = run.model if method == "full" else run.adapter
    text = checked_card(folder)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "tiny-llama"
    assert head["license"] == "apache-2.0"
    assert re.search(r"\| loss \| [\d.]+ \[[\d.]+, [\d.]+\] \|", text)
    assert "| data | rows.jsonl |" in text
    values = loaded(folder, monkeypatch)
    ids = values["tokenizer"]("say 3", return_tensors="pt")["input_ids"]
    assert torch.isfinite(values["model"](input_ids=ids).logits).all()
    assert modes(folder) | modes(run.checkpoints) == {umask}


def test_the_card_of_a_reward_model(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a base of one's own, beside which the folder lies."""
    rows = [{"prompt": f"say {i}", "chosen": "yes " * (i % 5 + 1), "rejected": f"no {i}"} for i in range(16)]
    values = {
        "version": 1, "stage": "reward", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", rows)), "max_length": 96},
        "train": {"max_steps": 2, "effective_batch_size": 4}, "output": {"dir": str(tmp_path / "judge")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    reward.run(load(str(tmp_path / "recipe.yaml"), RewardRecipe))
    folder = Run(tmp_path / "judge").adapter
    text = checked_card(folder)
    assert f'from_pretrained("{base.name}", num_labels=1)' in text
    assert "not stated in the base's files" in text
    shutil.copytree(base, folder / base.name)
    made = loaded(folder, monkeypatch)
    ids = made["tokenizer"]("say 3", return_tensors="pt")["input_ids"]
    assert made["model"](input_ids=ids).logits.shape == (1, 1)


def test_the_card_of_a_merged_model(
    tmp_path: Path, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    settings = {"max_steps": 2, "per_device_eval_batch_size": 1}
    run = train(recipe(model={"name": "tiny-llama"}, train=settings, data={"eval_split": 12}))
    target = tmp_path / "merged"
    merge.run(str(run.path), str(target))
    text = checked_card(target)
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "tiny-llama"
    assert "| adapter | run |" in text
    assert "| method | lora (" in text
    assert "| data | rows.jsonl |" in text
    assert re.search(r"\| loss \| [\d.]+ \[[\d.]+, [\d.]+\] \|", text)  # of the run, with its interval
    assert "Of the adapter on its base, before the merge." in text
    assert "largest difference of a logit to base + adapter" in text
    made = loaded(target, monkeypatch)
    ids = made["tokenizer"]("say 3", return_tensors="pt")["input_ids"]
    assert torch.isfinite(made["model"](input_ids=ids).logits).all()
    assert modes(target) == {umask}
    monkeypatch.chdir(tmp_path)
    merge.run(str(run.path), str(target), overwrite=True)  # the card is ours, and goes with the rest


def test_links_are_left_alone(tmp_path: Path, umask: int) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    folder.mkdir()
    for file in (outside, folder / "weights"):
        file.touch()
        file.chmod(0o600)
    (folder / "link").symlink_to(outside)
    as_umask(folder)
    assert outside.stat().st_mode & 0o777 == 0o600
    assert (folder / "weights").stat().st_mode & 0o777 == umask
