"""Packing: nothing lost, nothing cut, rows nearly full, the same loss."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_sample_stands_in_one_row_that_it_fits(lengths: list[int]) -> None:
    rows = packing.plan(lengths, 64)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40))
def test_the_plan_is_best_fit_decreasing(lengths: list[int]) -> None:
    """Against the few lines that define it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(20 - length)
    assert len(packing.plan(lengths, 20)) == len(rooms)


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 700, 5000)
    rows = packing.plan(lengths, 1024)
    assert lengths.sum() / (1024 * len(rows)) > 0.99


def test_too_long_a_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sample of 65 tokens does not fit into rows of 64"):
        packing.plan([3, 65], 64)


def dataset(count: int = 40, weights: bool = False) -> Any:
    import datasets

    r = random.Random(3)
    ids = [[r.randrange(3, 90) for _ in range(r.randint(2, 30))] for _ in range(count)]
    labels = [[-100 if i < len(row) // 2 else token for i, token in enumerate(row)] for row in ids]
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if weights:
        columns["weights"] = [[0.5] * len(row) for row in ids]
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("group", [3, 4096])
def test_packed_rows_hold_the_samples(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "GROUP", group)
    plain = dataset(weights=True).shuffle(seed=0)  # with an index over its rows
    packed = packing.pack(plain, 64)
    assert packed.column_names == ["input_ids", "labels", "weights", "seq_lengths"]
    samples = []
    for row in packed:
        at = 0
        for length in row["seq_lengths"]:
            samples.append(tuple(tuple(row[name][at : at + length]) for name in ("input_ids", "labels", "weights")))
            at += length
        assert at == len(row["input_ids"]) <= 64
    wanted = [tuple(tuple(row[name]) for name in ("input_ids", "labels", "weights")) for row in plain]
    assert sorted(samples) == sorted(wanted)


def test_the_loss_is_that_of_unpacked_rows() -> None:
    """Sum of the token losses over all samples, one by one and packed, through trl's own collator."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, attention_dropout=0.0,
        )
    ).eval()  # fmt: skip

    def total(rows: Any, padding_free: bool) -> float:
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
        loss = 0.0
        for row in rows:
            batch = collate([row])
            labels = batch.pop("labels")
            keys = ("input_ids", "attention_mask", "position_ids")
            logits = model(**{k: batch[k] for k in keys if k in batch}, use_cache=False).logits[0, :-1].double()
            loss += torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        return loss

    plain = dataset(20)
    with torch.no_grad():
        alone, packed = total(plain, False), total(packing.pack(plain, 64), True)
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_dataset_on_disk_is_packed_on_disk(tmp_path: Path) -> None:
    import datasets

    dataset(20).save_to_disk(tmp_path / "saved")
    on_disk = datasets.load_from_disk(tmp_path / "saved")
    packed = packing.pack(on_disk, 64)
    assert packed[:] == packing.pack(dataset(20), 64)[:]
    assert Path(packed.cache_files[0]["filename"]).parent == tmp_path / "saved"
    part = packing.pack(on_disk.select(range(9)), 64)
    assert sum(len(lengths) for lengths in part["seq_lengths"]) == 9
    assert packing.pack(on_disk, 64)[:] == packed[:]
    assert not list((tmp_path / "saved").glob("*.part"))


def test_an_empty_dataset_stays_empty() -> None:
    import datasets

    empty = datasets.Dataset.from_dict({"input_ids": [], "labels": []})
    assert len(packing.pack(empty, 64)) == 0
