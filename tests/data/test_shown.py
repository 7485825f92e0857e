"""Nothing of a row disappears: each field of a turn is in the ids, refused, or named in a warning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from chat_kit import assistant, byte_level, encoder, make_rows, user, write
from test_templates import make

from finetune.data import audit, chat, shown, templates
from finetune.data.types import Conversation
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

PUBLISHED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "qname", "arguments": {"qkey": "qvalue"}}}
OTHER = {"id": "abcdefghj", "type": "function", "function": {"name": "pname", "arguments": {"pkey": "pvalue"}}}
ASKED, THOUGHT, SAID = "qasked", "qthought", "qsaid"
ROWS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"role": "system", "content": "qsystem"}, user(ASKED), assistant(SAID)],
    "reasoning": [user(ASKED), assistant(SAID, reasoning_content=THOUGHT)],
    "tags": [user(ASKED), assistant(f"<think>\n{THOUGHT}\n</think>\n\n{SAID}")],
    "turns": [
        user(ASKED), assistant(f"<think>\n{THOUGHT}\n</think>\n\n{SAID}"),
        user("rasked"), assistant("<think>\nrthought\n</think>\n\nrsaid"),
    ],
    "name": [{**user(ASKED), "name": "qbob"}, assistant(SAID)],
    "call": [
        user(ASKED), assistant(SAID, tool_calls=[CALL]), {"role": "tool", "content": "qresult"}, assistant("rsaid"),
    ],
    "calls": [
        user(ASKED), assistant("", tool_calls=[CALL, OTHER]),
        {"role": "tool", "content": "qresult", "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": "presult", "tool_call_id": "abcdefghj"}, assistant("rsaid"),
    ],
}  # fmt: skip
FIELDS = {
    "qthought": "thinking", "rthought": "thinking", "qbob": "name",
    **dict.fromkeys(("qname", "qkey", "qvalue", "pname", "pkey", "pvalue"), "tool call"),
}  # fmt: skip


def words(messages: list[dict[str, Any]]) -> set[str]:
    return set(re.findall(r"\b[pqr][a-z]+\b", repr(messages).replace("\\n", " ")))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_published_templates_leave_out_is_found(path: Path) -> None:
    """The oracle: which words of a real row are in the text that the template renders."""
    template = path.read_text(encoding="utf-8")
    variables = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    shows = templates.expresses(template, tuple(variables.items()))

    def show(messages: Any, tools: Any) -> str | None:
        if any("tool_calls" in m for m in messages):
            messages, tools = templates.tools_as_text(messages, tools, *shows)
        return templates.attempt(template, messages, tools, variables)

    tags = shown.tags_of(template)
    for name, messages in ROWS.items():
        text = show(messages, None)
        if text is None:
            continue
        lost = {w for w in words(messages) & {*FIELDS, "qsystem", ASKED, SAID, "qresult", "rsaid"} if w not in text}
        found = shown.Losses(show, tags).of(messages, None)
        fields = {FIELDS.get(word, "content") for word in lost}
        if name in ("tags", "turns") and "think>" not in template:  # to which such thinking is content like any other
            fields = {"content"} if fields else set()
        assert {field for _, field in found} == fields, name


def test_qwen3_drops_the_thinking_of_earlier_turns() -> None:
    _, made = make("qwen3")
    assert made.encode(Conversation(ROWS["turns"])).lost == (("the thinking of turn 2", True),)
    assert made.encode(Conversation(ROWS["turns"]), "last").lost == (("the thinking of turn 2", False),)
    assert made.encode(Conversation(ROWS["tags"])).lost == ()
    assert made.encode(Conversation(ROWS["reasoning"])).lost == ()
    assert encoder().encode(Conversation(ROWS["reasoning"])).lost == (("the thinking of turn 2", True),)
    untrained = [*ROWS["turns"]]
    untrained[1] = {**untrained[1], "train": False}
    assert made.encode(Conversation(untrained)).lost == (("the thinking of turn 2", False),)


def test_the_shape_of_a_row_decides_not_the_row_before_it() -> None:
    """What is remembered of one conversation must not answer for another."""
    made = chat.make_encoder(byte_level((Path(trl.__file__).parent / "chat_templates/gptoss.jinja").read_text()))
    one = [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "r"}, assistant("a")]
    assert made.encode(Conversation(one)).lost == ()
    assert made.encode(Conversation(ROWS["calls"])).lost == (("the tool call of turn 2", True),)
    assert made.encode(Conversation(one)).lost == ()


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_thinking_is_trained_under_each_of_its_names(key: str, tmp_path: Path) -> None:
    tokenizer, made = make("qwen3")
    rows = [{"messages": [user("q one"), {"role": "assistant", key: "first thought", "content": "answer one"}]}]
    config = DataConfig(train=write(tmp_path / "x.jsonl", rows))
    ((_, encoded),) = audit.Audit(config, made).rows()
    assert isinstance(encoded, chat.Encoded)
    trained = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert trained.startswith("<think>\nfirst thought\n</think>\n\nanswer one")


def problems(tmp_path: Path, made: Any, *messages: dict[str, Any], **settings: Any) -> list[tuple[str, str, str]]:
    path = write(tmp_path / "x.jsonl", [{"messages": list(messages)}])
    report = audit.check(DataConfig(train=path, **settings), made)
    return [(p["level"], p["kind"], p["message"]) for p in report.problems]


def test_two_thoughts_are_refused(tmp_path: Path) -> None:
    both = {"role": "assistant", "content": "a", "thinking": "t", "reasoning_content": "other"}
    ((level, kind, _),) = problems(tmp_path, encoder(), user("q"), both)
    assert (level, kind) == ("error", "two_thoughts")
    same = {**both, "reasoning_content": "t"}
    assert problems(tmp_path, make("qwen3")[1], user("q"), same) == []


def test_lost_words_are_an_error_where_they_would_be_trained_and_else_a_warning(tmp_path: Path) -> None:
    ((level, kind, message),) = problems(tmp_path, make("qwen3")[1], *ROWS["turns"])
    assert (level, kind) == ("error", "lost_content")
    assert message == (
        "the chat template leaves out the thinking of turn 2, which would be trained"
        " → set data.train_on: last, or give each turn a row of its own"
    )
    ((level, kind, message),) = problems(tmp_path, make("qwen3")[1], *ROWS["turns"], train_on="last")
    assert (level, message) == ("warning", "the chat template leaves out the thinking of turn 2")
    ((level, _, message),) = problems(tmp_path, encoder(), *ROWS["reasoning"])
    assert (level, "set model.chat_template" in message) == ("error", True)
    ((level, _, message),) = problems(tmp_path, encoder(), *ROWS["name"])
    assert (level, message) == ("warning", "the chat template leaves out the name of turn 1")


def test_keys_that_nobody_reads_are_named(tmp_path: Path) -> None:
    odd = {"role": "assistant", "content": "a", "mood": "good", "images": [], "audio": None}
    assert problems(tmp_path, encoder(), user("q"), odd) == [
        ("warning", "unread_key", "messages, turn 2: not read: mood")
    ]
    ((level, kind, message),) = problems(tmp_path, encoder(), {**user("q"), "images": ["x.png"]}, assistant("a"))
    assert (level, kind) == ("error", "unsupported_content")
    assert message.startswith("messages, turn 1: images cannot be read")
    rows = [{"prompt": "q", "completion": "a", "reasoning": "because", "id": 7}] * 2
    made = audit.Audit(DataConfig(train=write(tmp_path / "y.jsonl", rows)), encoder())
    assert len(list(made.rows())) == 2
    assert "2 keys that are not read: reasoning" in made.warnings()
    rows = [{"ask": "q", "reasoning": "a"}]
    used = DataConfig(train=write(tmp_path / "z.jsonl", rows), columns={"prompt": "ask", "completion": "reasoning"})
    assert audit.check(used, encoder()).problems == []


def test_chatglm_has_no_place_for_thinking() -> None:
    from finetune.models import tokenizers
    from finetune.recipe.sections import ModelConfig

    made = chat.make_encoder(tokenizers.load_tokenizer(ModelConfig(name="tiny-chatglm3")))
    assert made.encode(Conversation(ROWS["reasoning"])).lost == (("the thinking of turn 2", True),)
    assert made.encode(Conversation(ROWS["plain"])).lost == ()
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"k": {}}}}}
    assert made.encode(Conversation(ROWS["call"], [tool])).lost == ()


# --- calls in a row ---

CALLS = [
    {"from": "human", "value": "How old are both?"},
    {"from": "function_call", "value": '{"name": "age", "arguments": {"born": "1990"}}'},
    {"from": "function_call", "value": '{"name": "age", "arguments": {"born": "1992"}}'},
    {"from": "observation", "value": '{"age": 36}'},
    {"from": "observation", "value": '{"age": 34}'},
    {"from": "gpt", "value": "36 and 34."},
]


def test_calls_in_a_row_are_parallel_calls(tmp_path: Path) -> None:
    _, made = make("qwen3")
    made_of = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", [{"conversations": CALLS}])), made)
    ((item, _),) = made_of.rows()
    assert made_of.notes.problems == []
    assert isinstance(item.sample, Conversation)
    assert [m["role"] for m in item.sample.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    calls = item.sample.messages[1]["tool_calls"]
    assert [call["function"]["arguments"]["born"] for call in calls] == ["1990", "1992"]


def test_a_call_belongs_to_what_was_said_just_before_it(tmp_path: Path) -> None:
    turns = [CALLS[0], {"from": "gpt", "value": "Let me look."}, *CALLS[1:]]
    ((item, _),) = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", [{"conversations": turns}]))).rows()
    assert isinstance(item.sample, Conversation)
    assert item.sample.messages[1]["content"] == "Let me look."
    assert len(item.sample.messages[1]["tool_calls"]) == 2


def test_the_advice_for_turns_out_of_order_fits(tmp_path: Path) -> None:
    first, second = assistant("", tool_calls=[CALL]), assistant("", tool_calls=[OTHER])
    ((_, kind, message),) = problems(
        tmp_path, None, user("q"), first, second, {"role": "tool", "content": "r"}, assistant("a")
    )
    assert kind == "wrong_order"
    advice = "write them as one turn: parallel calls are one turn with several tool_calls"
    assert message == f"turn 3: assistant after assistant → {advice}"


def test_one_good_row_stays_good(tmp_path: Path) -> None:
    assert audit.check(DataConfig(train=write(tmp_path / "x.jsonl", make_rows(3))), encoder()).problems == []


# --- templates and tokenizers that cannot work ---


def test_a_template_that_is_none_is_told_with_file_and_line(tmp_path: Path) -> None:
    from finetune.models import tokenizers
    from finetune.recipe.sections import ModelConfig

    def built(text: str) -> Any:
        (tmp_path / "x.jinja").write_text(text)
        model = ModelConfig(name="tiny-llama", chat_template=str(tmp_path / "x.jinja"))
        return chat.make_encoder(tokenizers.load_tokenizer(model))

    loop = "{% for m in messages %}\n"
    with pytest.raises(UserError, match=r"x\.jinja, line 2: model\.chat_template: the chat template is not valid"):
        built(loop + "{{ m.content }\n{% endfor %}")
    with pytest.raises(UserError, match=r"x\.jinja, line 3: .*No filter named 'nix'"):
        built(loop + "\n{{ m.content | nix }}{% endfor %}")
    with pytest.raises(UserError, match=r"the chat template fails in .*x\.jinja, line 3 \(UndefinedError: 'nix'"):
        built(loop + "\n{{ m.content + nix.x }}{% endfor %}")
    made = built(loop + "\n{{ m.content ~ 1 // (m.content | length - 3) }}{% endfor %}")
    with pytest.raises(UserError, match=r"x\.jinja, line 3 \(ZeroDivisionError"):
        made.encode(Conversation([user("abc"), assistant("x")]))
    with pytest.raises(UserError, match="nobody here"):  # a template's own words
        built(
            "{% if messages | length > 2 %}{{ raise_exception('nobody here') }}{% endif %}"
            + loop
            + "{{ m.content }}{% endfor %}"
        ).prompt_ids([user("a"), assistant("b"), user("c")])


def test_tokens_outside_of_the_embedding_are_told_before_training(tmp_path: Path) -> None:
    tokenizer = byte_level(None, ("<|im_start|>", "<|im_end|>"), plain=("<extra>",))
    extra = tokenizer.convert_tokens_to_ids("<extra>")
    tokenizer.embedding_rows = extra
    made = chat.make_encoder(tokenizer)
    rows = [*make_rows(1), {"messages": [user("q"), assistant("<extra>")]}]
    problem = audit.check(DataConfig(train=write(tmp_path / "x.jsonl", rows)), made).problems[0]
    assert (problem["row"], problem["kind"]) == (2, "unknown_token")
    assert problem["message"].startswith(f"token '<extra>' has the id {extra}, but the model embeds only the ids below")
    with pytest.raises(UserError, match="<extra>"):
        made.prompt_ids([{"role": "system", "content": "<extra>"}, user("q")])
    tokenizer.embedding_rows = 200  # less than the template itself needs: one line instead of one for every row
    with pytest.raises(UserError, match="the model embeds only the ids below 200"):
        chat.make_encoder(tokenizer)


def test_the_size_of_the_embedding_comes_from_the_config() -> None:
    from finetune.models import tokenizers
    from finetune.recipe.sections import ModelConfig

    assert tokenizers.load_tokenizer(ModelConfig(name="tiny-llama")).embedding_rows == 1024
    assert tokenizers.load_tokenizer(ModelConfig(name="tiny-chatglm3")).embedding_rows == 1088


def test_turn_markers_are_found_in_thinking_and_calls() -> None:
    llama2 = (Path(templates.__file__).parents[2] / "data_templates/chat_templates/llama2.jinja").read_text()
    made = chat.make_encoder(byte_level(llama2, bos="<s>"))
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "[INST] b"}}}
    turns = [user("q"), assistant("a", reasoning_content="t [/INST]", tool_calls=[call])]
    assert made.forged_markers(turns) == [(2, "[/INST]"), (2, "[INST]")]


def test_results_stand_in_the_order_of_the_calls_they_name(tmp_path: Path) -> None:
    first, second = ({"role": "tool", "tool_call_id": call["id"], "content": call["id"]} for call in (CALL, OTHER))
    both = assistant("", tool_calls=[CALL, OTHER])
    for results in ([first, second], [second, first]):
        rows = [{"messages": [user("q"), both, *results, assistant("a")]}]
        ((item, _),) = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", rows))).rows()
        assert isinstance(item.sample, Conversation)
        assert [m["content"] for m in item.sample.messages[2:4]] == ["abcdefghi", "abcdefghj"]
    unnamed = [{"role": "tool", "content": "b"}, {"role": "tool", "content": "a"}]
    rows = [{"messages": [user("q"), both, *unnamed, assistant("a")]}]
    ((item, _),) = audit.Audit(DataConfig(train=write(tmp_path / "x.jsonl", rows))).rows()
    assert isinstance(item.sample, Conversation)
    assert [m["content"] for m in item.sample.messages[2:4]] == ["b", "a"]


def test_a_flag_that_trains_nothing_is_named(tmp_path: Path) -> None:
    flagged = {**user("q"), "train": True}
    ((level, kind, message),) = problems(tmp_path, encoder(), flagged, assistant("a"))
    assert (level, kind) == ("warning", "unread_key")
    assert message == "turn 1: not read: train (only turns of the assistant are trained)"
    assert problems(tmp_path, encoder(), flagged, assistant("a"), train_on="all") == []
    assert problems(tmp_path, encoder(), {**flagged, "train": False}, assistant("a", train=True)) == []
