"""Which rows a step is made of, epoch by epoch, as the trainer's passes get them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import train, write_rows
from transformers import Trainer

from finetune.training.longest import LongestFirst

Recipe = Callable[..., Path]

Pass = list[tuple[int, ...]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The token ids of every row of every pass, in order."""
    seen: list[Pass] = []
    step = Trainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *more: Any, **options: Any) -> Any:
        if "attention_mask" in inputs:
            pairs = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
            seen.append([tuple(ids[: sum(mask)]) for ids, mask in pairs])
        else:  # side by side in one row
            ids, starts = inputs["input_ids"][0].tolist(), (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            seen.append([tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)])
        return step(self, model, inputs, *more, **options)

    monkeypatch.setattr(LongestFirst, "on_train_begin", lambda *_, **__: None)  # no pass beside the steps
    monkeypatch.setattr(Trainer, "training_step", watched)
    return seen


def test_an_epoch_has_every_row_once_in_an_order_of_its_own(recipe: Recipe, passes: list[Pass]) -> None:
    train(recipe(train={"max_steps": None, "num_train_epochs": 2, "effective_batch_size": 16}))
    assert [len(one) for one in passes] == [16] * 8
    first, second = ([row for one in half for row in one] for half in (passes[:4], passes[4:]))
    assert len(set(first)) == 64
    assert sorted(first) == sorted(second)
    assert first != second
    assert {frozenset(one) for one in passes[:4]} != {frozenset(one) for one in passes[4:]}, "other batches, too"


def test_a_step_has_rows_of_like_length(recipe: Recipe, tmp_path: Path, passes: list[Pass]) -> None:
    """All passes of it: padding is small, and the steps are those of one pass."""
    draw = random.Random(0)
    rows = [{"prompt": f"{i:02d}", "completion": "x" * draw.randint(1, 90)} for i in range(64)]
    settings = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 2, "group_by_length": True}
    train(recipe(train=settings, data={"train": str(write_rows(tmp_path / "r.jsonl", rows)), "max_length": 200}))
    assert [len(one) for one in passes] == [2] * 32
    lengths = [[len(row) for one in passes[at : at + 4] for row in one] for at in range(0, 32, 4)]
    inside = sorted(n for step in lengths for n in step)
    assert sorted(map(sorted, lengths)) == sorted(inside[at : at + 8] for at in range(0, 64, 8))
    assert lengths != sorted(lengths), "long and short steps take turns"


def test_pairs_are_as_long_as_their_longer_answer(base: Path, tmp_path: Path, passes: list[Pass]) -> None:
    import yaml

    from finetune.commands import reward
    from finetune.recipe.file import load
    from finetune.recipe.stages import RewardRecipe

    draw = random.Random(0)
    sizes = [draw.sample(range(1, 90), 2) for _ in range(24)]
    pairs = [{"prompt": f"{i:02d}", "chosen": "x" * a, "rejected": "y" * b} for i, (a, b) in enumerate(sizes)]
    values = {
        "version": 1, "stage": "reward", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "max_length": 200},
        "adapter": {"method": "lora", "r": 2}, "output": {"dir": str(tmp_path / "run")},
        "train": {"num_train_epochs": 1, "effective_batch_size": 4, "group_by_length": True, "warmup_steps": 0},
    }  # fmt: skip
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(values))
    reward.run(load(str(tmp_path / "reward.yaml"), RewardRecipe))
    steps = [[max(map(len, pair)) for pair in zip(one[:4], one[4:], strict=True)] for one in passes]
    longest = sorted(n for step in steps for n in step)
    assert sorted(map(sorted, steps)) == [longest[at : at + 4] for at in range(0, 24, 4)]
