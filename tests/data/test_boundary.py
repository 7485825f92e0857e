"""A tokenizer that merges the header of a turn with the answer trains on tokens that generation never sees: said."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_tokenizer, write_rows

from finetune.data import conversations
from finetune.data.chat import make_encoder
from finetune.recipe.sections import DataConfig


@pytest.mark.parametrize("merges", [False, True])
def test_merged_boundary_is_named(tmp_path: Path, merges: bool) -> None:
    tokenizer = make_tokenizer()
    if merges:  # "\n" of the header and "{" of the answer become one token
        tokenizer.add_tokens(["\n{"])
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f'{{"n": {i}}}'}]}
        for i in range(8)
    ]
    config = DataConfig(train=str(write_rows(tmp_path / "r.jsonl", rows)))
    data = conversations.load_sft(config, make_encoder(tokenizer))
    assert any("8 of 8 sampled rows the tokenizer merges" in line for line in data.warnings) is merges
