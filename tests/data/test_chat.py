"""Ids and labels written out; what is trained; tools; tokenizers without a template, without offsets or an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, byte_level, encoder, sentencepiece_like, system, tokenizer, trained_ranges, user
from test_templates import make

from finetune.data import chat, templates
from finetune.data.encoder import Encoder, scored_end, scored_ids
from finetune.data.types import Conversation, Encoded, RowProblem
from finetune.errors import UserError

END, START = 256, 258  # ids of <|im_end|> and <|im_start|> in the byte-level tokenizer
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"id": 7}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def text(row: Encoded, labels: bool = False) -> str:
    return tokenizer().decode([t for t in row.labels if t != -100] if labels else row.input_ids)


def encode_batch(made: Encoder, conversations: list[Conversation]) -> list[Encoded | RowProblem]:
    """In the three steps of the audit."""
    plans = made.plan_batch(conversations, "assistant")
    return made.label_batch(plans, made.tokenize_batch(plans))


def test_golden_ids_and_labels() -> None:
    made = byte_level(None, ("<|im_start|>",), eos="<|im_end|>")
    start, end = made.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    row = chat.make_encoder(made).encode(Conversation([user("hi"), assistant("yo")]))
    ids = {char: made.convert_tokens_to_ids(char) for char in "userasitnhyo"}
    line = made.encode("\n")[0]
    u, a, r = ([ids[c] for c in word] for word in ("user", "assistant", "yo"))
    assert row.input_ids == [start, *u, line, ids["h"], ids["i"], end, line, start, *a, line, *r, end, line]
    assert row.labels == [-100] * (len(row.input_ids) - 4) + [*r, end, -100]
    assert row.weights is None
    assert trained_ranges(row) == [(len(row.input_ids) - 4, len(row.input_ids) - 1)]


def test_what_is_trained() -> None:
    messages = [system("s"), user("q"), assistant("one"), user("r"), assistant("two")]
    made = encoder()
    assert text(made.encode(Conversation(messages)), labels=True) == "one<|im_end|>two<|im_end|>"
    assert text(made.encode(Conversation(messages), "last"), labels=True) == "two<|im_end|>"
    everything = made.encode(Conversation(messages), "all")
    assert everything.labels == everything.input_ids
    flagged = [system("s"), user("q"), assistant("one", train=False), user("r"), assistant("two", train=True)]
    assert text(made.encode(Conversation(flagged)), labels=True) == "two<|im_end|>"
    masked = [user("q"), assistant("one", train=False)]
    assert set(made.encode(Conversation(masked)).labels) == {-100}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "chatml"])
def test_tool_output_is_never_trained(name: str) -> None:
    made, encoder = make(name)
    output = {"role": "tool", "content": "1"}
    messages = [
        user("q1"),
        assistant("", tool_calls=[CALL]),
        output,
        assistant("a1"),
        user("r"),
        assistant("b", train=False),
    ]
    row = encoder.encode(Conversation(messages, [TOOL]), "all")
    left_out = made.decode([t for t, label in zip(row.input_ids, row.labels, strict=True) if label == -100])
    end = "<end_of_turn>" if name == "gemma3" else made.eos_token
    shown = {"llama3_1": '"1"', "gemma3": "<tool_response>\n1\n</tool_response>"}.get(name, "1")
    opening = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert left_out in (f"{shown}{opening}b{end}", f"1{opening}b{end}")
    row = encoder.encode(Conversation(messages, [TOOL]))
    assert [made.decode(row.input_ids[a:b])[-len(end) :] for a, b in trained_ranges(row)] == [end, end]


def test_turns_may_have_weights() -> None:
    row = encoder().encode(Conversation([user("q"), assistant("ab", train=0.5), user("r"), assistant("c")]))
    assert row.weights is not None
    assert [(w, label != -100) for w, label in zip(row.weights, row.labels, strict=True) if w or label != -100] == (
        [(0.5, True)] * 3 + [(1.0, True)] * 2
    )


def test_reasoning_is_handed_to_templates_that_know_it() -> None:
    made, encoder = make("qwen3")
    messages = [user("q"), assistant("a", reasoning_content="hm")]
    row = encoder.encode(Conversation(messages))
    assert row.input_ids == made.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert "<think>\nhm\n</think>" in made.decode(row.input_ids)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct", "llama3_1"])
def test_tools_in_templates_that_know_them(name: str) -> None:
    made, encoder = make(name)
    messages = [user("q"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "42"}, assistant("a")]
    row = encoder.encode(Conversation(messages, [TOOL]))
    assert row.input_ids == made.apply_chat_template(messages, tools=[TOOL], tokenize=True, return_dict=False)
    called, answered = (made.decode(row.input_ids[a:b]) for a, b in trained_ranges(row))
    assert '"look_up"' in called
    assert "42" not in called + answered
    assert answered.endswith("a" + made.eos_token)


def test_tools_as_text_where_a_template_has_no_place_for_them() -> None:
    messages = [
        system("s"),
        user("q"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "42"},
        assistant("a"),
    ]
    row = encoder().encode(Conversation(messages, [TOOL]))
    shown = text(row)
    assert shown.startswith("<|im_start|>system\ns\n\nYou may call these functions")
    assert '<tools>\n{"name": "look_up", "parameters": {"type": "object"}}\n</tools>' in shown
    assert "<|im_start|>tool\n42<|im_end|>" in shown
    called = '<tool_call>\n{"name": "look_up", "arguments": {"id": 7}}\n</tool_call><|im_end|>'
    assert text(row, labels=True) == called + "a<|im_end|>"
    prompt = encoder().prompt_ids(messages[:2], [TOOL])
    assert row.input_ids[: len(prompt)] == prompt


def test_tool_results_become_user_turns_where_there_is_no_tool_role() -> None:
    _, encoder = make("gemma3")
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    messages = [user("q"), assistant("", tool_calls=[CALL, CALL]), *results, assistant("a")]
    shown = encoder.tokenizer.decode(encoder.encode(Conversation(messages, [TOOL])).input_ids)
    assert "user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><end_of_turn>" in shown


def test_bases_without_a_template() -> None:
    plain = byte_level(None)
    made = chat.make_encoder(plain)
    assert made.origin == "the shipped template plain.jinja (the tokenizer has none)"
    row = made.encode(Conversation([system("s"), user("q"), assistant("a")]))
    assert plain.decode(row.input_ids) == "s\n\nUser: q\n\nAssistant: a</s>\n\n"
    assert plain.decode([t for t in row.labels if t != -100]) == " a</s>"
    assert plain.decode(made.prompt_ids([user("q")])) == "User: q\n\nAssistant:"
    from finetune.families import Family

    llama2 = Family("x", template="llama2.jinja")
    assert chat.make_encoder(byte_level(None, bos="<s>"), llama2).template == templates.shipped()["llama2"]
    with pytest.raises(UserError, match=r"the shipped template llama2.jinja .*'bos_token' is undefined"):
        chat.make_encoder(plain, llama2)


def test_control_tokens_tell_the_template_of_a_base_without_one() -> None:
    tokens = {
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "gemma": ("<start_of_turn>", "<end_of_turn>"),
        "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
        "baichuan2": ("<reserved_106>", "<reserved_107>"),
    }
    for name, specials in tokens.items():
        made = chat.make_encoder(byte_level(None, specials, bos="<s>"))
        assert made.template == templates.shipped()[name]
        assert made.notice == f"chat format: the shipped template {name}.jinja (the tokenizer has none)"
    assert encoder().notice is None


def test_a_list_of_named_templates_gives_the_default() -> None:
    made = byte_level({"rag": "x", "default": tokenizer().chat_template}, ("<|im_start|>",), eos="<|im_end|>")  # type: ignore[arg-type]
    assert chat.make_encoder(made).template == tokenizer().chat_template


def test_unknown_templates_by_difference() -> None:
    turn = "{{ '[' + m.role|upper + '] ' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
    prompt = "{% if add_generation_prompt %}{{ '[ASSISTANT] ' }}{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}" + prompt
    made = byte_level(template)
    encoder = chat.make_encoder(made)
    assert isinstance(encoder, chat.TemplateEncoder)
    assert encoder.spans.annotated is None
    row = encoder.encode(Conversation([user("q"), assistant("[USER] x"), user("r"), assistant("b")]))
    assert [made.decode(row.input_ids[a:b]) for a, b in trained_ranges(row)] == ["[USER] x</s>", "b</s>"]
    assert encoder.forged_markers([user("a [USER] b")]) == [(1, "[USER]")]


def test_where_nothing_ends_a_turn_the_next_ones_beginning_does() -> None:
    """GLM-4's kind: the next role's token ends a turn, and nothing ends the last one."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    made = byte_level(template, ("<|user|>", "<|assistant|>", "<|system|>"))
    encoder = chat.make_encoder(made)
    row = encoder.encode(Conversation([user("q"), assistant("a"), user("r"), assistant("b")]))
    assert made.decode([t for t in row.labels if t != -100]) == "a<|user|>b<|user|>"
    assert scored_end(encoder) == row.input_ids[-1] == made.convert_tokens_to_ids("<|user|>")
    assert encoder.stop_ids == [row.input_ids[-1], made.eos_token_id]


def test_a_template_without_any_end_of_turn_gets_one_at_the_end() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    made = byte_level(template + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    row = chat.make_encoder(made).encode(Conversation([user("q"), assistant("a"), user("r"), assistant("b")]))
    assert made.decode([t for t in row.labels if t != -100]) == "a\nb\n</s>"
    assert scored_end(chat.make_encoder(made)) == made.eos_token_id


@pytest.mark.parametrize(
    ("after_each", "after_all", "end"),
    [
        ("<|end|><|stop|>", "", "<|stop|>"),  # Command R's kind: two tokens end every turn
        ("<|end|>", "<|stop|>", "<|end|>"),  # Phi-4-mini's: the second ends the text
        ("<|end|>\n", "<|stop|>", "<|end|>"),
    ],
)
def test_what_ends_a_turn_is_what_is_written_after_each(after_each: str, after_all: str, end: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '" + after_each.replace("\n", "\\n") + "' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}" + after_all + "{% endif %}"
    )
    made = byte_level(template, ("<|user|>", "<|assistant|>", "<|end|>"), eos="<|stop|>")
    encoder = chat.make_encoder(made)
    row = encoder.encode(Conversation([user("q"), assistant("a"), user("r"), assistant("b")]))
    wanted = after_each.partition(end)[0] + end
    assert made.decode([t for t in row.labels if t != -100]) == f"a{wanted}b{wanted}"
    assert encoder.end_id == made.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "gemma3", "mistral", "phi3", "chatml"])
def test_replies_are_scored_with_the_end_that_pairs_have(name: str) -> None:
    _, encoder = make(name)
    row = encoder.encode(Conversation([user("q"), assistant("a")]))
    assert scored_end(encoder) == scored_ids(row, encoder.separator)[-1]


def test_replies_that_their_prompt_does_not_open_are_told() -> None:
    """DeepSeek-R1's kind: the prompt opens a thought that the record of the reply leaves out."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    made = byte_level(template, ("<|user|>", "<|assistant|>"))
    encoder = chat.make_encoder(made)
    for content in ("a", "<b>", "<think", "\n<think>"):
        row = encoder.encode(Conversation([user("q"), assistant(content)]))
        assert made.decode([t for t in row.labels if t != -100]) == content + "</s>"
        assert row.unprompted == (1,)
    row = encoder.encode(Conversation([user("q"), assistant("<think>\nb")]))
    assert (made.decode([t for t in row.labels if t != -100]), row.unprompted) == ("b</s>", ())


def test_templates_whose_prompt_has_another_header_than_their_record_are_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assist: ' }}{% endif %}"
    )
    with pytest.raises(RowProblem, match="prompt is not how its record of the reply begins"):
        chat.make_encoder(byte_level(template)).encode(Conversation([user("q"), assistant("a")]))


def test_a_templates_own_marks_are_used() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    made = byte_level(template)
    row = chat.make_encoder(made).encode(Conversation([user("q"), assistant("a")]))
    assert made.decode([t for t in row.labels if t != -100]) == "a</s>"  # the end of turn is a label, though not marked


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_labels(scheme: str) -> None:
    made = sentencepiece_like(templates.shipped()["llama2"], scheme)
    row = chat.make_encoder(made).encode(Conversation([user("he he"), assistant("a he"), user("x"), assistant("b")]))
    assert row.input_ids == made.apply_chat_template(
        [user("he he"), assistant("a he"), user("x"), assistant("b")], tokenize=True, return_dict=False
    )
    assert [made.decode(row.input_ids[a:b]).strip() for a, b in trained_ranges(row)] == ["a he </s>", "b </s>"]


def test_a_token_that_straddles_the_header_and_the_reply_is_not_trained() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {char: i for i, char in enumerate("uaq:\n!xE", 0)} | {"\n\n": 8}
    backend = Tokenizer(models.BPE(vocab, [("\n", "\n")]))
    template = "{% for m in messages %}{{ m.role[0] + '\n' + m.content }}"
    template += "{% if m.role == 'assistant' %}!{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a\n' }}{% endif %}"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!", chat_template=template)
    row = chat.make_encoder(made).encode(Conversation([user("q"), assistant("\nx")]))
    assert made.convert_ids_to_tokens(row.input_ids) == ["u", "\n", "q", "a", "\n\n", "x", "!"]
    assert [label != -100 for label in row.labels] == [False] * 5 + [True] * 2


class Slow:
    """A tokenizer that gives ids and nothing else."""

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.init_kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self.fast, name)


def test_tokenizers_without_offsets() -> None:
    messages = [user("q 你"), assistant("a 好"), user("r"), assistant("b")]
    slow = chat.make_encoder(Slow(tokenizer()))
    assert slow.encode(Conversation(messages)) == encoder().encode(Conversation(messages))
    with pytest.raises(RowProblem, match="slow tokenizer"):
        slow.encode(Conversation([user("<|im_end|>"), assistant("a")]))


def test_batches_equal_single_rows_and_carry_problems() -> None:
    good = Conversation([user("q"), assistant("a")])
    forged = Conversation([user("q<|im_end|>"), assistant("a")])
    _, gemma = make("gemma")
    rows = encode_batch(gemma, [good, Conversation([system("s"), user("q"), assistant("a")]), forged])
    assert rows[0] == gemma.encode(good)
    assert isinstance(rows[1], RowProblem)
    assert rows[2] == gemma.encode(forged)


def test_what_cannot_be_encoded_is_the_users_to_mend() -> None:
    """Outside of a file, as in chat: exit code 2 and one line."""
    _, gemma = make("gemma")
    with pytest.raises(UserError) as caught:
        gemma.prompt_ids([system("s"), user("q")])
    assert caught.value.exit_code == 2
    assert len(caught.value.lines()) == 1


def test_chatglm_goes_its_own_way() -> None:
    """Its goldens stand in test_chat_glm.py; here only the way through the common door."""
    from finetune.models.chatglm.tokenizer import build_tokenizer

    made = build_tokenizer(Path(__file__).parents[1] / "fixtures" / "chatglm" / "chatglm3" / "checkpoint")
    encoder = chat.make_encoder(made)
    assert isinstance(encoder, chat.GlmEncoder)
    assert encoder.template is None
    messages = [user("a<|user|>"), assistant("b"), user("c"), assistant("d", train=0.5)]
    row = encoder.encode(Conversation(messages))
    prompt = encoder.prompt_ids(messages[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert row.weights is not None
    assert {w for w, label in zip(row.weights, row.labels, strict=True) if label != -100} == {0.5, 1.0}
    assert row.labels[-1] == made.eos_token_id in encoder.stop_ids
    rows = encode_batch(encoder, [Conversation(messages), Conversation([user("q"), assistant("a", train=False)])])
    assert rows[0] == row
