"""A folder is a dataset: its train split is trained, its validation split offered, its test split never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_kit import encoder, write
from typer.testing import CliRunner

from finetune import cli
from finetune.data import conversations, held_out, sources
from finetune.data.samples import read_samples
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

LAYOUTS: dict[str, dict[str, str]] = {
    "names": {"train.jsonl": "train", "validation.jsonl": "validation", "test.jsonl": "test"},
    "short names": {"train_1.json": "train", "train_2.json": "train", "val.json": "validation", "my-test.json": "test"},
    "dev": {"zh.train.jsonl": "train", "zh.dev.jsonl": "validation", "zh.testset.jsonl": "test"},
    "folders": {"train/a.jsonl": "train", "train/b.jsonl": "train", "valid/a.jsonl": "validation",
                "test/a.jsonl": "test"},
    "hub": {"data/train-00000-of-00002.jsonl": "train", "data/train-00001-of-00002.jsonl": "train",
            "data/test-00000-of-00001.jsonl": "test"},
    "test inside train": {"train/a.jsonl": "train", "train/test.jsonl": "test"},
    "others beside": {"train.jsonl": "train", "all.jsonl": "", "eval.jsonl": "validation"},
    "no train": {"part1.jsonl": "train", "part2.jsonl": "train", "test.jsonl": "test"},
    "capitals": {"Train.jsonl": "train", "TEST.jsonl": "test"},
    "chinese": {"训练集.jsonl": "train", "测试集.jsonl": "test"},
    "no splits": {"a.jsonl": "train", "latest.jsonl": "train", "strained.jsonl": "train", "b/device.jsonl": "train"},
}  # fmt: skip


def lay(folder: Path, files: dict[str, str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, [{"prompt": name, "completion": "a"}])


def prompts(path: Any, split: str | None = None) -> set[str]:
    spec = {"path": str(path), "split": split} if split else str(path)
    return {item.sample.messages[0]["content"] for item in read_samples(spec, DataConfig(train="-"))}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_train_is_trained(name: str, tmp_path: Path) -> None:
    files = LAYOUTS[name]
    lay(tmp_path, files)
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / "LICENSE").write_text("no data")
    assert (
        prompts(tmp_path) == prompts(f"{tmp_path}/**/*.json*") == {f for f, split in files.items() if split == "train"}
    )
    for split in ("validation", "test"):
        if split in files.values():
            assert prompts(tmp_path, split) == {f for f, s in files.items() if s == split}
    held = next((split for split in ("validation", "test") if split in files.values()), None)
    if held:
        rows = held_out.load_eval_rows(str(tmp_path))
        assert {row.messages[0]["content"] for row in rows} == {f for f, split in files.items() if split == held}


def test_what_is_not_trained_is_named_and_offered(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    lay(folder, LAYOUTS["names"])
    data = conversations.load_sft(DataConfig(train=str(folder)), encoder())
    assert data.counts["rows"] == 1
    offer = f"; for figures on held-out rows: --set eval.data='{folder / 'validation.jsonl'}'"
    line = f"{folder}: trained without its validation (validation.jsonl), test (test.jsonl)"
    assert line + offer in data.warnings
    held = str(folder / "validation.jsonl")
    assert line in conversations.load_sft(DataConfig(train=str(folder)), encoder(), eval_data=held).warnings
    shown = CliRunner().invoke(cli.app, ["data", "check", "--data", str(folder)])
    assert shown.exit_code == 0
    assert line + offer in shown.output.replace("\n", "")
    assert sources.left_out(
        [{"path": held}, {"path": "builtin:tickets/train"}, {"path": str(folder / "*n.jsonl")}], True
    ) == [f"{folder}/*n.jsonl: trained without its validation (validation.jsonl){offer}"]


def test_a_folder_of_held_out_rows_is_not_trained(tmp_path: Path) -> None:
    lay(tmp_path, {"test.jsonl": "test", "val.jsonl": "validation"})
    with pytest.raises(UserError, match="no file to train on, only test and validation data → name the file itself"):
        prompts(tmp_path)
    assert prompts(tmp_path / "test.jsonl") == prompts(tmp_path / "te*.jsonl") == {"test.jsonl"}
    with pytest.raises(UserError, match=r"no split 'train' \(splits: test, validation\)"):
        prompts(tmp_path, "train")
    with pytest.raises(UserError, match="one file has no split 'test'"):
        prompts(tmp_path / "test.jsonl", "test")


def test_where_the_folder_lies_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "test" / "train"
    folder.mkdir(parents=True)
    lay(folder, {"a.jsonl": "train", "val.jsonl": "validation"})
    monkeypatch.chdir(folder)
    for path in (folder, f"{folder}/*.jsonl", ".", "*.jsonl"):
        assert prompts(path) == {"a.jsonl"}
        assert prompts(path, "val") == {"val.jsonl"}
        with pytest.raises(UserError, match=r"no split 'test' \(splits: validation\)"):
            prompts(path, "test")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    tables = {
        name: datasets.Dataset.from_list([{"prompt": name, "completion": "a"}] * 4)
        for name in ("train_sft", "test_sft")
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "dict", num_shards={"train_sft": 2, "test_sft": 1})
    assert prompts(tmp_path / "dict") == prompts(tmp_path / "dict", "train_sft") == {"train_sft"}
    assert len(list(sources.read_rows(tmp_path / "dict"))) == 4
    assert {row.messages[0]["content"] for row in held_out.load_eval_rows(str(tmp_path / "dict"))} == {"test_sft"}
    tables["test_sft"].save_to_disk(tmp_path / "one")
    saved = datasets.load_from_disk(tmp_path / "one")
    saved.map(lambda row: {"prompt": "from a cache"})  # writes cache-….arrow beside the data
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 2
    assert [row.data["prompt"] for row in sources.read_rows(tmp_path / "one")] == ["test_sft"] * 4
