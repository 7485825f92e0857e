"""What the loaders of all kinds do alike: one signature, one result, one limit, one split, one repetition."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_kit import encoder, tokenizer, write

from finetune.data import conversations, pairs, prompts, text
from finetune.data.encoder import cut
from finetune.data.rows import Rows, eval_mask
from finetune.data.types import Encoded, Text
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig, SourceConfig

LOADERS: dict[str, Callable[..., Rows]] = {
    "sft": conversations.load_sft, "pairs": pairs.load_pairs, "unpaired": pairs.load_unpaired,
    "prompts": prompts.load_prompts, "text": text.load_blocks,
}  # fmt: skip
FITS: dict[str, dict[str, Any]] = {
    name: {"max_length": 5} if name == "text" else {} for name in LOADERS
}  # a text a block
CHAT = ["sft", "pairs", "unpaired", "prompts"]


def load(name: str, data: DataConfig, **more: Any) -> Rows:
    return LOADERS[name](data, tokenizer() if name == "text" else encoder(), **more)


def rows_of(name: str, count: int, word: str = "q") -> list[dict[str, Any]]:
    if name == "text":
        return [{"text": f"{word} {i:02d}"} for i in range(count)]
    if name == "pairs":
        return [{"prompt": f"{word} {i:02d}", "chosen": "yes", "rejected": "no"} for i in range(count)]
    if name == "unpaired":
        return [{"prompt": f"{word} {i:02d}", "completion": "yes", "label": i % 2 == 0} for i in range(count)]
    return [{"prompt": f"{word} {i:02d}", "completion": "yes"} for i in range(count)]


def ids(name: str, row: Any) -> list[int]:
    """The longest text of a row, as tokens."""
    if name == "prompts":
        return list(row.ids)
    if name == "unpaired":
        return [*row["prompt_ids"], *row["completion_ids"]]
    return list(row["chosen_ids" if name == "pairs" else "input_ids"])


@pytest.mark.parametrize("name", LOADERS)
def test_all_are_called_alike(name: str) -> None:
    config, source, *more = inspect.signature(LOADERS[name]).parameters.values()
    assert (config.name, config.annotation) == ("config", "DataConfig")
    assert source.annotation == ("Any" if name == "text" else "Encoder")
    assert [(p.name, p.default) for p in more[:2]] == [("seed", 42), ("eval_data", None)]
    assert all(p.kind is p.KEYWORD_ONLY for p in more)


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_a_row_of_exactly_max_length_is_whole_and_one_more_is_too_long(name: str, policy: str, tmp_path: Path) -> None:
    rows = rows_of(name, 2)
    rows[1]["prompt"] += "+"  # one token more
    data = DataConfig(train=write(tmp_path / "x.jsonl", rows))
    short, long = (ids(name, row) for row in load(name, data).train)
    assert len(long) == len(short) + 1
    data = data.model_copy(update={"on_overlong": policy, "max_dropped": 1.0, "max_length": len(long)})
    whole = load(name, data)
    assert [ids(name, row) for row in whole.train] == [short, long]
    assert (whole.counts["truncated"], whole.counts["dropped"], whole.counts.get("overlong", 0)) == (0, 0, 0)
    data = data.model_copy(update={"max_length": len(short)})
    if policy == "error":
        with pytest.raises(UserError, match=rf"row 2: .*{len(long)} tokens, over data.max_length {len(short)}"):
            load(name, data)
        return
    if name == "unpaired" and policy == "drop":
        with pytest.raises(UserError, match="every answer is labelled good"):
            load(name, data)
        return
    less = load(name, data)
    assert ids(name, less.train[0]) == short
    if name == "prompts":  # a prompt is never cut
        assert (len(less.train), less.counts["overlong"]) == (1, 1)
    elif policy == "drop":
        assert (len(less.train), less.counts["dropped"], less.counts["truncated"]) == (1, 1, 0)
    else:
        assert (ids(name, less.train[1]), less.counts["truncated"]) == (long[:-1], 1)


def test_a_text_of_exactly_max_length_is_one_block(tmp_path: Path) -> None:
    def blocks(texts: list[str], length: int) -> list[list[int]]:
        data = DataConfig(train=write(tmp_path / "x.jsonl", [{"text": t} for t in texts]), max_length=length)
        return load("text", data).train.ids.tolist()  # type: ignore[no-any-return]

    (start,) = text.separator(tokenizer())
    one, two, long = ([start, *tokenizer().encode(t)] for t in ("a" * 7, "b" * 7, "c" * 8))
    assert blocks(["a" * 7], 8) == [one]
    assert blocks(["a" * 7, "b" * 7], 8) == [one, two]
    assert blocks(["a" * 3, "b" * 7], 8) == [[start, *one[1:4], *two[:4]], two], "a text that fits stands whole"
    assert blocks(["a" * 3, "c" * 8], 8) == [[start, *one[1:4], *long[:4]]], "a longer one is continued"
    with pytest.raises(UserError, match="the text does not fill one block of 9 tokens"):
        blocks(["a" * 7], 9)


def test_a_rest_is_a_shorter_block_where_it_holds_something_to_predict() -> None:
    assert list(text.pack(["a"], lambda _: [1], 2, [0], rest=True)) == [[0, 1]]
    assert list(text.pack(["a", "b"], lambda _: [1], 3, [0], rest=True)) == [[0, 1, 0], [0, 1]]
    assert list(text.pack(["a"], lambda _: [1], 3, [], rest=True)) == []


def test_cutting_leaves_what_is_no_longer_than_the_limit() -> None:
    row = Encoded([1, 2, 3], [1, 2, 3])
    assert cut(tokenizer(), row, 3) is row
    assert cut(tokenizer(), row, None) is row
    assert cut(tokenizer(), row, 2).input_ids == [1, 2]


def asked(name: str, rows: Any) -> Counter[str]:
    """How often each question stands in the rows."""
    every = rows.ids.tolist() if name == "text" else [ids(name, row) for row in rows]
    return Counter(re.findall(r"\w+ \d\d", "".join(tokenizer().decode(row) for row in every)))


@pytest.mark.parametrize("name", LOADERS)
def test_all_hold_out_the_same_questions(name: str, tmp_path: Path) -> None:
    found = load(name, DataConfig(train=write(tmp_path / "x.jsonl", rows_of(name, 40)), eval_split=5, **FITS[name]))
    mask = eval_mask(np.asarray([Text(f"q {i:02d}").content_hash for i in range(40)], np.uint64), 5)
    held = Counter(f"q {i:02d}" for i in np.flatnonzero(mask))
    assert len(held) == 5
    assert asked(name, found.eval) == held
    assert asked(name, found.train) == Counter(f"q {i:02d}" for i in range(40)) - held
    assert name == "text" or found.counts["eval_rows"] == 5


@pytest.mark.parametrize("name", LOADERS)
def test_all_repeat_the_rows_of_a_weighted_source(name: str, tmp_path: Path) -> None:
    once = SourceConfig(path=write(tmp_path / "once.jsonl", rows_of(name, 12, "a")))
    often = SourceConfig(path=write(tmp_path / "often.jsonl", rows_of(name, 12, "b")), weight=3.0)
    found = asked(name, load(name, DataConfig(train=[once, often], **FITS[name])).train)
    assert found == {f"{word} {i:02d}": times for word, times in (("a", 1), ("b", 3)) for i in range(12)}


@pytest.mark.parametrize("name", LOADERS)
def test_nothing_left_to_train_on_is_said(name: str, tmp_path: Path) -> None:
    data = DataConfig(train=write(tmp_path / "x.jsonl", rows_of(name, 4)), eval_split=9, **FITS[name])
    with pytest.raises(UserError, match=r"data.eval_split: every (row|text) is held out: .* of .* → hold out fewer"):
        load(name, data)
