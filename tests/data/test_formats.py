# ruff: noqa: E501  (rows and their samples side by side)
"""Every format, written out: recognised by its columns, converted to exactly these samples."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, converted, first, system, user

from finetune.data import formats
from finetune.data.samples import read_samples
from finetune.data.sources import read_rows
from finetune.data.types import Conversation, Preference, RowProblem, Text, Unpaired
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig
from finetune.resources import resource_path

SAMPLES = resource_path("data_templates")
CALL = {"type": "function", "function": {"name": "order_status", "arguments": {"order_id": "4417"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "order_status",
        "description": "Where an order is.",
        "parameters": {"type": "object", "properties": {"order_id": {"type": "string"}}, "required": ["order_id"]},
    },
}


def pair(question: str, chosen: str, rejected: str) -> Preference:
    return Preference([user(question)], [assistant(chosen)], [assistant(rejected)])


# file -> (format, its samples)
GOLDEN: dict[str, tuple[str, list[Any]]] = {
    "alpaca.json": ("alpaca", [
        Conversation([
            user("把下面的句子翻译成英文。\n今天的快递已经送到前台。"),
            assistant("Today's parcel has been delivered to the front desk."),
        ]),
        Conversation([user("Name the three primary colours."), assistant("Red, yellow and blue.")]),
        Conversation([
            system("You answer in one short sentence."),
            user("When does the library open?"), assistant("It opens at nine in the morning."),
            user("And when does it close?"), assistant("It closes at six in the evening."),
        ]),
    ]),
    "self_instruct.jsonl": ("self_instruct", [
        Conversation([user("Sort the numbers in ascending order.\n7, 2, 5"), assistant("2, 5, 7")]),
        Conversation([user("Sort the numbers in ascending order.\n10, 3"), assistant("3, 10")]),
        Conversation([user("写出这个词的反义词。\n安静"), assistant("吵闹")]),
    ]),
    "sharegpt.json": ("sharegpt", [
        Conversation([
            user("怎么把照片从手机传到电脑？"),
            assistant("用数据线连接两台设备，然后在电脑上打开手机的存储，复制照片文件夹即可。"),
            user("没有数据线呢？"), assistant("可以把照片上传到网盘，再在电脑上下载。"),
        ]),
        Conversation([
            system("You are the assistant of a small online shop."),
            user("Where is my order 4417?"), assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": '{"status": "shipped", "city": "Leipzig"}'},
            assistant("Your order 4417 has been shipped and is in Leipzig now."),
        ], [TOOL]),
    ]),
    "messages.jsonl": ("messages", [
        Conversation([
            system("You are a patient teacher."), user("Why is the sky blue?"),
            assistant("Air scatters blue light more than red light, so blue reaches us from all sides."),
        ]),
        Conversation([
            user("帮我查一下订单 4417。"), assistant("", tool_calls=[{"id": "call_1", **CALL}]),
            {"role": "tool", "content": '{"status": "shipped"}', "tool_call_id": "call_1"}, assistant("订单 4417 已经发货。"),
        ], [TOOL]),
        Conversation([
            user("Say hello in French."), assistant("Hello!", train=False), user("In French, please."), assistant("Bonjour !"),
        ]),
    ]),
    "chatglm3.json": ("chatglm3", [
        Conversation([
            system("你是一个简洁的助手。"), user("水在多少度沸腾？"), assistant("在标准大气压下是 100 摄氏度。"),
            user("在高山上呢？"), assistant("气压更低，所以沸点更低。", train=True),
        ]),
        Conversation([
            user("订单 4417 到哪里了？"), assistant("我来查询订单状态。", tool_calls=[CALL]),
            {"role": "tool", "content": '{"status": "shipped", "city": "Leipzig"}'},
            assistant("订单 4417 已发货，现在在莱比锡。"),
        ], [TOOL]),
    ]),
    "prompt_completion.jsonl": ("prompt_completion", [
        Conversation([user("Complete the proverb: the early bird"), assistant("catches the worm.")]),
        Conversation([system("Answer with one word."), user("法国的首都是哪里？"), assistant("巴黎")]),
    ]),
    "question_answer.csv": ("question_answer", [
        Conversation([
            user("A pen costs 3 euros. What do four pens cost?"), assistant("Four pens cost 4 * 3 = 12 euros.\n#### 12"),
        ]),
        Conversation([user("小明有 5 个苹果，吃了 2 个，还剩几个？"), assistant("还剩 5 - 2 = 3 个。")]),
    ]),
    "inputs_targets.tsv": ("inputs_targets", [
        Conversation([
            user("Is this review positive or negative? The room was clean and quiet."), assistant("positive"),
        ]),
        Conversation([user("这条评论是正面还是负面？等了一个小时才上菜。"), assistant("负面")]),
    ]),
    "text.txt": ("text", [
        Text("A river begins in the mountains, where rain and melted snow run together."),
        Text("城市的公共图书馆不仅借书，也举办讲座和展览。"),
        Text("Every line of a text file that is not blank is a document of its own."),
    ]),
    "preference.jsonl": ("preference", [
        pair("How do I keep bread fresh?", "Wrap it in a cloth and keep it in a bread box, away from the sun.",
             "Just buy new bread."),
        pair("推荐一本入门的天文学书。", "可以从《宇宙》读起，它文字流畅，几乎不需要数学基础。", "不知道。"),
    ]),
    "preference_transcript.jsonl": ("preference", [
        pair("Can I eat rhubarb leaves?", "No, the leaves are poisonous. Only the stalks are eaten.", "Sure, enjoy them."),
    ]),
    "preference_sharegpt.json": ("preference", [
        pair("用一句话解释什么是通货膨胀。", "通货膨胀是指物价普遍持续上涨，钱的购买力随之下降。", "就是东西。"),
    ]),
    "ranked.jsonl": ("ranked", [
        pair("Write a slogan for a bicycle shop.", "Two wheels, one city, all yours.", "We sell bicycles."),
        pair("Write a slogan for a bicycle shop.", "Two wheels, one city, all yours.", "Bike."),
        pair("Write a slogan for a bicycle shop.", "We sell bicycles.", "Bike."),
        pair("给咖啡馆起个名字。", "慢半拍咖啡", "街角"),
    ]),
    "unpaired.jsonl": ("unpaired", [
        Unpaired([user("What is 12 times 12?")], [assistant("144")], True),
        Unpaired([user("水的化学式是什么？")], [assistant("CO2")], False),
    ]),
}  # fmt: skip


def test_every_shipped_sample_and_every_format_is_here() -> None:
    files = {
        f.name for f in SAMPLES.iterdir() if f.is_file() and f.suffix != ".md" and not f.name.startswith("tickets")
    }
    assert files == set(GOLDEN)
    assert {form.sample for form in formats.FORMATS.values()} <= files
    assert {name for name, _ in GOLDEN.values()} == set(formats.FORMATS)


@pytest.mark.parametrize("file", GOLDEN)
def test_samples(file: str) -> None:
    name, wanted = GOLDEN[file]
    assert formats.detect([row.data for row in read_rows(SAMPLES / file)]) == name
    items = list(read_samples(SAMPLES / file, DataConfig(train="-"), None))
    assert [item.problem for item in items] == [None] * len(wanted)
    assert [item.sample for item in items] == wanted


@pytest.mark.parametrize("file", GOLDEN)
def test_the_name_of_the_file_does_not_matter(file: str, tmp_path: Path) -> None:
    suffix = Path(file).suffix if Path(file).suffix in (".csv", ".tsv", ".txt") else ""
    renamed = tmp_path / f"tickets_alpaca_dpo{suffix}"
    shutil.copy(SAMPLES / file, renamed)
    assert [i.sample for i in read_samples(renamed, DataConfig(train="-"), None)] == GOLDEN[file][1]


@pytest.mark.parametrize("file", [f for f in GOLDEN if Path(f).suffix != ".txt"])
def test_the_order_of_rows_and_columns_does_not_matter(file: str) -> None:
    rows = [row.data for row in read_rows(SAMPLES / file)] * 3
    random.Random(0).shuffle(rows)
    assert formats.detect([dict(reversed(row.items())) for row in rows]) == GOLDEN[file][0]


def test_one_broken_row_does_not_change_the_format() -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 3
    assert formats.detect([{"prompt": "p", "chosen": "c"}, *rows]) == "preference"
    assert (
        formats.detect([{"instruction": "i", "output": ["a", "b"]}, *[{"instruction": "i", "output": "o"}] * 3])
        == "alpaca"
    )


def test_columns_can_be_mapped() -> None:
    row = {"问题": "q", "回答": "a", "id": 3}
    columns = {"instruction": "问题", "output": "回答"}
    assert formats.detect([row], columns) == "alpaca"
    assert first(row, "alpaca", columns) == Conversation([user("q"), assistant("a")])
    with pytest.raises(UserError, match=r"no known format has the columns id, 回答, 问题"):
        formats.detect([row])


@pytest.mark.parametrize(("row", "wanted"), [
    # OpenAI's older forms and names of roles
    ({"messages": [{"role": "developer", "content": "s"}, user("q"), assistant("a")]}, [system("s"), user("q"), assistant("a")]),
    ({"messages": [user("q"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                   {"role": "function", "name": "f", "content": "r"}, assistant("a")]},
     [user("q"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
      {"role": "tool", "content": "r", "name": "f"}, assistant("a")]),
    ({"messages": [user("q"), assistant("a", weight=0), user("q"), assistant("a", weight=1), user("q"), assistant("a", weight=0.5)]},
     [user("q"), assistant("a", train=False), user("q"), assistant("a", train=True), user("q"), assistant("a", train=0.5)]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     [system("s"), user("q"), assistant("a")]),
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'},
                        {"from": "tool", "value": "1"}, {"from": "gpt", "value": "a"}], "tools": ""},
     [user("q"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                                           {"type": "function", "function": {"name": "g", "arguments": {}}}]),
      {"role": "tool", "content": "1"}, assistant("a")]),
    ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "metadata": "f", "content": "c"},
                        {"role": "observation", "content": "r"}, {"role": "assistant", "metadata": "", "content": "a"}]},
     [user("q"), assistant("c", metadata="f"), {"role": "tool", "content": "r"}, assistant("a")]),
    ({"query": "q", "response": "a"}, [user("q"), assistant("a")]),
    ({"problem": "1+1", "solution": 2}, [user("1+1"), assistant("2")]),
    ({"question": "q", "context": "c", "answer": "a"}, [user("c\nq"), assistant("a")]),
    ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, [user("q\nc"), assistant("a")]),
    ({"instruction": "q", "input": None, "output": "a", "system": " "}, [user("q"), assistant("a")]),
    ({"input": "q", "output": "a"}, [user("q"), assistant("a")]),
    ({"kind": "k", "input": "q", "target": "a"}, [user("q"), assistant("a")]),
    ({"conversations": ["q", "a", "r", "b"]}, [user("q"), assistant("a"), user("r"), assistant("b")]),
])  # fmt: skip
def test_variants(row: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    name = formats.detect([row])
    sample = first(row, name)
    assert isinstance(sample, Conversation)
    assert sample.messages == wanted


def test_preference_variants() -> None:
    turns = [user("q"), assistant("a1"), user("r")]
    transcripts = {"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    wanted = Preference(turns, [assistant("good")], [assistant("bad")])
    assert first(transcripts, "preference") == wanted
    assert first({"prompt": turns, **transcripts}, "preference") == wanted
    assert first({"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
                           "preference") == pair("q", "a", "b")  # fmt: skip
    assert first({"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"}, "preference") == pair(
        "i\nx", "a", "b"
    )
    scored = {
        "prompt": "q",
        "completions": [{"response": "a", "overall_score": 3}, {"response": "b", "overall_score": 8}],
    }
    assert formats.detect([scored]) == "ranked"
    assert converted(scored, "ranked") == [pair("q", "b", "a")]
    listed = {"prompt": "q", "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}]}
    assert converted(listed, formats.detect([listed])) == [pair("q", "b", "a")]
    assert converted({"instruction": "q", "output": ["a", "b"], "rank": [2, 1]}, "ranked") == [pair("q", "b", "a")]
    assert first({"conversations": [user("q"), assistant("a")], "kto_tag": False}, "unpaired") == (
        Unpaired([user("q")], [assistant("a")], False)
    )


def test_a_prompt_alone_is_a_prompt() -> None:
    for row in ({"prompt": "q"}, {"instruction": "q"}, {"question": "q"}, {"messages": [user("q")]}):
        assert first(row, formats.detect([row])) == Conversation([user("q")])


def test_rows_that_do_not_fit_raise_a_row_problem() -> None:
    with pytest.raises(RowProblem, match="no 'instruction'"):
        first({"instructoin": "i"}, "alpaca")
