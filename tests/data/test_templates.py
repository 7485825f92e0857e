"""The shipped templates with {% generation %} marks render what the families' own render, and mark the replies.

The published templates stand in trl's package (an installed dependency); those it does not have are written here from
the model cards.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from chat_kit import assistant, byte_level, system, trained_ranges, user

from finetune.data import chat, templates
from finetune.data.types import Conversation
from finetune.families import Family
from finetune.resources import resource_path

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ '<<SYS>>\\n' + content.strip() + '\\n<</SYS>>\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
STOCK: dict[str, str] = {
    **{name: name for name in ("qwen2_5", "qwen3", "llama3", "llama3_1", "gemma", "gemma3", "phi3", "phi3_5")},
    "qwen3_instruct": "qwen3_instruct_2507",
}
STOCK = {name: (PUBLISHED / f"{file}.jinja").read_text(encoding="utf-8") for name, file in STOCK.items()}
STOCK |= {"llama2": LLAMA2, "mistral": MISTRAL, "chatml": CHATML, "phi4": PHI4}
TOKENS: dict[str, dict[str, Any]] = {
    "qwen2_5": {
        "specials": ("<|im_start|>", "<|endoftext|>"), "eos": "<|im_end|>", "plain": ("<tool_call>", "</tool_call>"),
    },
    "qwen3": {
        "specials": ("<|im_start|>", "<|endoftext|>"), "eos": "<|im_end|>",
        "plain": ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    },
    "llama3": {
        "specials": ("<|start_header_id|>", "<|end_header_id|>"), "eos": "<|eot_id|>", "bos": "<|begin_of_text|>",
    },
    "gemma": {"specials": ("<start_of_turn>", "<end_of_turn>"), "eos": "<eos>", "bos": "<bos>"},
    "llama2": {"bos": "<s>", "eos": "</s>"},
    "phi3": {
        "specials": ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"), "eos": "<|endoftext|>", "bos": "<s>",
        "rstrip": ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"),
    },
    "phi4": {"specials": ("<|im_start|>", "<|im_sep|>", "<|endoftext|>"), "eos": "<|im_end|>"},
}  # fmt: skip
LIKE = {
    "qwen3_instruct": "qwen3",
    "llama3_1": "llama3",
    "gemma3": "gemma",
    "mistral": "llama2",
    "phi3_5": "phi3",
    "chatml": "qwen2_5",
}
FAMILIES = sorted(STOCK)


def make(name: str) -> tuple[Any, chat.TemplateEncoder]:
    """A byte-level tokenizer with the family's control tokens and published template, and its encoder."""
    tokenizer = byte_level(STOCK[name], **TOKENS[LIKE.get(name, name)])
    encoder = chat.make_encoder(tokenizer)
    assert isinstance(encoder, chat.TemplateEncoder)
    return tokenizer, encoder


def test_every_shipped_template_is_tested() -> None:
    without_stock = {"plain", "bluelm", "baichuan2"}  # for bases that publish none
    assert set(templates.shipped()) == set(STOCK) | without_stock


@pytest.mark.parametrize("name", FAMILIES)
def test_renders_like_the_stock_template(name: str) -> None:
    _, encoder = make(name)
    assert encoder.spans.annotated == templates.shipped()[name]
    for messages, tools in templates.PROBES:
        for prompt in (False, True):
            wanted = templates.attempt(STOCK[name], messages, tools, encoder.variables, prompt)
            assert templates.attempt(encoder.spans.annotated, messages, tools, encoder.variables, prompt) == wanted


# Replies that repeat the prompt, hold markers or white space, stand next to turns without content.
CONVERSATIONS = [
    [user("q"), assistant("a")],
    [user("the same"), assistant("the same")],
    [user("one"), assistant("two"), user("one"), assistant("two")],
    [user("q"), assistant("assistant\nuser"), user("assistant"), assistant("system")],
    [user("q"), assistant("x" * 300)],
    [user("q"), assistant("你好，世界 🙂"), user("继续"), assistant("好")],
    [user("q"), assistant("a"), user(""), assistant("b")],
    [user("q"), assistant(""), user("r"), assistant("b")],
    [user("show ```python\nx = 1\n```"), assistant("1\n2\n\n3")],
    [user("{{ x }}"), assistant("{% raw %}")],
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_ids_are_the_stock_ids_and_labels_are_the_replies(name: str, number: int) -> None:
    tokenizer, encoder = make(name)
    messages = CONVERSATIONS[number]
    row = encoder.encode(Conversation(messages))
    assert row.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ends = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "phi3": "<|end|>", "phi3_5": "<|end|>"}
    end = ends.get(name, tokenizer.eos_token)
    replies = [m["content"] for m in messages if m["role"] == "assistant"]
    wanted = [f" {reply} {end}" if name == "llama2" else reply + end for reply in replies]
    if name == "qwen3":
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in trained_ranges(row)] == wanted
    labelled = [i for i, label in enumerate(row.labels) if label != -100]
    assert all(row.labels[i] == row.input_ids[i] for i in labelled)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_the_shipped_copy_the_difference_gives_the_same(name: str) -> None:
    _, encoder = make(name)
    if name == "qwen3":
        pytest.skip("drops old thinking: not prefix-stable")
    row = encoder.encode(Conversation(CONVERSATIONS[2]))
    encoder.spans.annotated = None
    assert encoder.encode(Conversation(CONVERSATIONS[2])) == row


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_the_beginning_of_the_sample(name: str) -> None:
    """What generation starts from is what training saw before the first trained token."""
    tokenizer, encoder = make(name)
    messages = [user("one"), assistant("two"), user("three"), assistant("four")]
    row = encoder.encode(Conversation(messages), train_on="last")
    prompt = encoder.prompt_ids(messages[:-1])
    assert prompt == tokenizer.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert row.input_ids[: len(prompt)] == prompt
    assert trained_ranges(row)[0][0] == len(prompt)
    assert row.labels[trained_ranges(row)[0][1] - 1] in encoder.stop_ids


def test_turns_that_are_written_otherwise_once_more_follow_are_found_by_what_stands_around_them() -> None:
    _, encoder = make("qwen3")
    thought = "<think>\nhm\n</think>\n\n"
    for messages in (
        [user("one"), assistant("two"), user("three"), assistant("four")],
        [user(" one "), assistant("\ntwo "), user("three\n"), assistant(" four")],
        [user("same"), assistant("same"), user("same"), assistant("same")],
        [system("s"), user("q"), assistant(thought + "a"), user("r"), assistant(thought + "b")],
        [user("q"), assistant(""), user("r"), assistant("b")],
    ):
        row = encoder.encode(Conversation(messages))
        annotated, encoder.spans.annotated = encoder.spans.annotated, None
        assert encoder.encode(Conversation(messages)) == row
        encoder.spans.annotated = annotated


def test_unstable_templates_are_refused_with_advice() -> None:
    """What is found around a turn must be sure: here the template looks at how contents begin."""
    template = (
        "{% for m in messages %}{{ '[' + m.role + ']' }}{% if loop.last or m.content[:1] in 'to' %}"
        "{{ m.content[:3] }}{% endif %}{{ (loop.last or m.role == 'user') and m.content or '' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    encoder = chat.make_encoder(byte_level(template))
    messages = [user("one"), assistant("two"), user("three"), assistant("four")]
    with pytest.raises(chat.RowProblem, match="writes turn 2 differently") as caught:
        encoder.encode(Conversation(messages))
    assert "data.train_on: last" in (caught.value.fix or "")
    assert len(trained_ranges(encoder.encode(Conversation(messages), "last"))) == 1


def test_qwen3_keeps_thinking_only_after_the_last_question() -> None:
    tokenizer, encoder = make("qwen3")
    thought = "<think>\nhm\n</think>\n\n"
    messages = [user("q"), assistant(thought + "a"), user("r"), assistant(thought + "b")]
    row = encoder.encode(Conversation(messages))
    assert row.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in trained_ranges(row)] == [
        "a<|im_end|>",
        thought + "b<|im_end|>",
    ]


def test_system_turns_that_a_template_refuses_are_the_rows_problem() -> None:
    _, encoder = make("gemma")
    with pytest.raises(chat.RowProblem, match="refuses this conversation: System role not supported"):
        encoder.encode(Conversation([system("s"), user("q"), assistant("a")]))


def test_no_template_in_data_templates_is_without_marks() -> None:
    files = list(resource_path("data_templates", "chat_templates").glob("*.jinja"))
    assert len(files) == 16
    assert all(templates.GENERATION.search(file.read_text(encoding="utf-8")) for file in files)


# Every family's rendering written out; what stands between « and » is trained.
TURNS = [system("S."), user("Hi, you"), assistant("Hello\nthere"), user("再见"), assistant("好 的")]
GOLDEN = {
    "chatml": "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nHi, you<|im_end|>\n"
    "<|im_start|>assistant\n«Hello\nthere<|im_end|>»\n<|im_start|>user\n再见<|im_end|>\n"
    "<|im_start|>assistant\n«好 的<|im_end|>»\n",
    "qwen3": "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\nHi, you<|im_end|>\n"
    "<|im_start|>assistant\n«Hello\nthere<|im_end|>»\n<|im_start|>user\n再见<|im_end|>\n"
    "<|im_start|>assistant\n«<think>\n\n</think>\n\n好 的<|im_end|>»\n",
    "llama2": "<s>[INST] <<SYS>>\nS.\n<</SYS>>\n\nHi, you [/INST]« Hello\nthere </s>»"
    "<s>[INST] 再见 [/INST]« 好 的 </s>»",
    "mistral": "<s>[INST] Hi, you [/INST]«Hello\nthere</s>»[INST] 再见 [/INST]«好 的</s>»",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi, you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello\nthere<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\n再见<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«好 的<|eot_id|>»",
    "llama3_1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi, you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello\nthere<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\n再见<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«好 的<|eot_id|>»",
    "gemma": "<bos><start_of_turn>user\nHi, you<end_of_turn>\n<start_of_turn>model\n«Hello\nthere<end_of_turn>»\n"
    "<start_of_turn>user\n再见<end_of_turn>\n<start_of_turn>model\n«好 的<end_of_turn>»\n",
    "gemma3": "<bos><start_of_turn>user\nS.\n\nHi, you<end_of_turn>\n"
    "<start_of_turn>model\n«Hello\nthere<end_of_turn>»\n<start_of_turn>user\n再见<end_of_turn>\n"
    "<start_of_turn>model\n«好 的<end_of_turn>»\n",
    # Phi-3's control tokens swallow the line break behind them.
    "phi3": "<|system|>\nS.<|end|>\n<|user|>\nHi, you<|end|>\n<|assistant|>\n«Hello\nthere<|end|>\n»"
    "<|user|>\n再见<|end|>\n<|assistant|>\n«好 的<|end|>\n»<|endoftext|>",
    "phi4": "<|im_start|>system<|im_sep|>S.<|im_end|><|im_start|>user<|im_sep|>Hi, you<|im_end|>"
    "<|im_start|>assistant<|im_sep|>«Hello\nthere<|im_end|>»<|im_start|>user<|im_sep|>再见<|im_end|>"
    "<|im_start|>assistant<|im_sep|>«好 的<|im_end|>»",
}
GOLDEN |= {"qwen2_5": GOLDEN["chatml"], "qwen3_instruct": GOLDEN["chatml"], "phi3_5": GOLDEN["phi3"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_ids_and_labels(name: str) -> None:
    tokenizer, encoder = make(name)
    turns = [m for m in TURNS if m["role"] != "system" or "S." in GOLDEN[name]]
    row = encoder.encode(Conversation(turns))
    ids: list[int] = []
    labels: list[int] = []
    for number, part in enumerate(re.split("[«»]", GOLDEN[name])):
        piece = tokenizer.encode(part, add_special_tokens=False) if part else []
        ids += piece
        labels += piece if number % 2 else [-100] * len(piece)
    assert row.input_ids == ids
    assert row.labels == labels


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("plain", "S.\n\nUser: Hi, you\n\nAssistant:« Hello\nthere</s>»\n\nUser: 再见\n\nAssistant:« 好 的</s>»\n\n"),
        ("bluelm", "S.[|Human|]:Hi, you[|AI|]:«Hello\nthere</s>»[|Human|]:再见[|AI|]:«好 的</s>»"),
        (
            "baichuan2",
            "S.<reserved_106>Hi, you<reserved_107>«Hello\nthere</s>»<reserved_106>再见<reserved_107>«好 的</s>»",
        ),
    ],
)
def test_golden_ids_and_labels_of_bases_without_a_template(name: str, golden: str) -> None:
    tokenizer = byte_level(None, ("<reserved_106>", "<reserved_107>") if name == "baichuan2" else ())
    row = chat.make_encoder(tokenizer, Family("x", template=f"{name}.jinja")).encode(Conversation(TURNS))
    assert tokenizer.decode(row.input_ids) == re.sub("[«»]", "", golden)
    assert [tokenizer.decode(row.input_ids[a:b]) for a, b in trained_ranges(row)] == re.findall(
        "«(.*?)»", golden, re.DOTALL
    )
