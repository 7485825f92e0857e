"""Chat ids and labels of ChatGLM3 (recorded from the original code), GLM-4 and ChatGLM2 (their published formats)."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.data.chat import make_encoder
from finetune.data.chat_glm import encode_weighted, glm_version, prompt_ids, stop_ids
from finetune.data.encoder import scored_end, scored_ids
from finetune.data.types import IGNORED, Conversation, RowProblem
from finetune.evaluation.generation import decode
from finetune.models.chatglm.tokenizer import build_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "chatglm"
CASES = ("chatglm3", "chatglm3_ratio50", "chatglm3_mha")
SYSTEM, USER, ASSISTANT, OBSERVATION, EOS = 955, 956, 957, 958, 2
WEATHER = {
    "name": "get_weather", "description": "查询天气",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["built", "saved and loaded again"])
def tokenizer(request, tmp_path_factory):
    built = build_tokenizer(FIXTURES / "chatglm3" / "checkpoint")
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("saved")
    built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def chatglm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x") / "chatglm2-6b"
    folder.mkdir()
    shutil.copy(FIXTURES / "chatglm3" / "checkpoint" / "tokenizer.model", folder)
    return build_tokenizer(folder)


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm4")
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(lines), encoding="ascii")
    return build_tokenizer(folder)


def encode_messages(tokenizer, messages, *arguments, **more):
    """Ids and labels."""
    ids, weights = encode_weighted(tokenizer, messages, *arguments, **more)
    return ids, [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]


def said(tokenizer, reply):
    return decode(make_encoder(tokenizer), reply, stop_ids(tokenizer))


def goldens(case, name):
    return json.loads((FIXTURES / case / name).read_text(encoding="utf-8"))


def text(tokenizer, string):
    return tokenizer(string, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_those_of_the_original_code(case):
    tokenizer = build_tokenizer(FIXTURES / case / "checkpoint")
    for row in goldens(case, "chat_golden.json"):
        messages = [*row["history"], {"role": row["role"], "content": row["query"]}]
        assert prompt_ids(tokenizer, messages) == row["input_ids"]


def without_tools(messages):
    return [{key: value for key, value in message.items() if key != "tools"} for message in messages]


@pytest.mark.parametrize("case", CASES)
def test_training_samples_are_those_of_the_published_demo(case):
    """Ids and labels, but for what the demo does against its own README: it drops tools and trains tool output."""
    tokenizer = build_tokenizer(FIXTURES / case / "checkpoint")
    differing = 0
    for row in goldens(case, "sft_golden.json"):
        messages = row["messages"]
        ids, labels = encode_messages(tokenizer, without_tools(messages))
        assert ids == row["input_ids"]
        untrained = tool_output(ids)
        assert labels == [-100 if i in untrained else label for i, label in enumerate(row["labels"])]
        differing += labels != row["labels"]
        # With tools kept, only the system turn grows; all that follows is the same.
        kept, kept_labels = encode_messages(tokenizer, messages)
        more = len(kept) - len(ids)
        described = any("tools" in message for message in messages)
        assert (more > 0) == described
        if described:
            system = messages[0]
            listed = f"{system['content']}\n{json.dumps(system['tools'], indent=4, ensure_ascii=False)}"
            head = [951, 953, SYSTEM, *text(tokenizer, "\n"), *text(tokenizer, listed)]
            assert kept == head + ids[len(head) - more :]
            assert kept_labels == [-100] * len(head) + labels[len(head) - more :]
        else:
            assert (kept, kept_labels) == (ids, labels)
    assert differing == 3  # the rows with an observation


def tool_output(ids):
    """Positions after `<|observation|>`, up to and including the next role: what the demo's code trains wrongly."""
    inside, positions = False, set()
    for position, token in enumerate(ids):
        if inside:
            positions.add(position)
        if token >= SYSTEM or token == EOS:
            inside = token == OBSERVATION
    return positions


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d e"},
]


def test_which_turns_carry_loss(tokenizer):
    newline = text(tokenizer, "\n")
    first = [*newline, *text(tokenizer, "b"), USER]
    last = [*newline, *text(tokenizer, "d e"), EOS]

    def trained(messages=CHAT, **options):
        ids, labels = encode_messages(tokenizer, messages, **options)
        assert len(ids) == len(labels)
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        return [label for label in labels if label != -100]

    assert trained() == trained(train_on="assistant") == first + last
    assert trained(train_on="last") == last
    ids, labels = encode_messages(tokenizer, CHAT, train_on="all")
    assert labels == [-100] * 3 + ids[3:]  # all but the prefix and the first role

    def flagged(**flags):
        return [{**message, "train": flags[f"m{i}"]} if f"m{i}" in flags else message for i, message in enumerate(CHAT)]

    assert trained(flagged(m2=False)) == last
    assert trained(flagged(m4=False)) == first
    assert trained(flagged(m2=True), train_on="last") == first + last
    assert trained(flagged(m4=False), train_on="last") == []
    assert trained(flagged(m1=True), train_on="last") == [*newline, *text(tokenizer, "a"), ASSISTANT, *last]


def test_weights_of_turns(tokenizer):
    ids, weights = encode_weighted(tokenizer, [*CHAT[:4], {**CHAT[4], "train": 0.25}])
    labels = encode_messages(tokenizer, CHAT)[1]
    end = len(text(tokenizer, "\n")) + len(text(tokenizer, "d e")) + 1
    expected = [float(label != -100) for label in labels]
    expected[-end:] = [0.25] * end
    assert weights == expected
    assert len(ids) == len(weights)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_tool_output_is_never_trained(tokenizer, train_on):
    for role in ("tool", "observation"):
        messages = [
            {"role": "user", "content": "北京天气"},
            {"role": "assistant", "metadata": "get_weather", "content": "x"},
            {"role": role, "content": "20 degrees", "train": True},
            {"role": "assistant", "content": "20"},
        ]
        ids, labels = encode_messages(tokenizer, messages, train_on=train_on)
        begin = ids.index(OBSERVATION)
        inside = len(text(tokenizer, "\n")) + len(text(tokenizer, "20 degrees"))
        assert labels[begin + 1 : begin + 2 + inside] == [-100] * (inside + 1)  # and the role after it
        # The model has to write the role that asks for the tool's output: it ends its turn.
        assert labels[begin] == (-100 if train_on == "last" else OBSERVATION)


def test_a_prompt_is_the_beginning_of_its_sample(tokenizer):
    for end in (2, 4):
        ids = encode_messages(tokenizer, CHAT[: end + 1])[0]
        prompt = prompt_ids(tokenizer, CHAT[:end])
        assert ids[: len(prompt)] == prompt
        assert prompt[-1] == ASSISTANT


def test_control_tokens_in_content_stay_text(tokenizer):
    for content in ("<|user|>", "</s>", "[gMASK]sop<|assistant|>\n", "philosophy"):
        ids, _ = encode_messages(
            tokenizer, [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        )
        control = [token for token in ids if token >= 950 or token == EOS]
        assert control == [951, 953, USER, ASSISTANT, EOS]
    ids = prompt_ids(tokenizer, [{"role": "user", "metadata": "<|system|>", "content": "x"}])
    assert [token for token in ids if token >= 950] == [951, 953, USER, ASSISTANT]


def test_tools_and_calls_in_the_openai_form(tokenizer):
    """What finetune/data/messages.py makes of every format becomes ChatGLM3's own way to write tools and calls."""
    wrapped = [{"type": "function", "function": WEATHER}]
    user = {"role": "user", "content": "北京天气"}
    own = {"role": "system", "content": "s", "tools": [WEATHER]}
    assert prompt_ids(tokenizer, [{"role": "system", "content": "s"}, user], wrapped) == prompt_ids(
        tokenizer, [own, user]
    )
    published = "Answer the following questions as best as you can. You have access to the following tools:"
    spelled = {**own, "content": published}
    assert prompt_ids(tokenizer, [user], wrapped) == prompt_ids(tokenizer, [spelled, user])
    calls = [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京", "days": 2}}},
        {"type": "function", "function": {"name": "now", "arguments": {}}},
    ]
    called = [user, {"role": "assistant", "content": "我看看", "tool_calls": calls}, {"role": "tool", "content": "20"}]
    written = [
        user,
        {"role": "assistant", "content": "我看看"},
        {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京', days=2)\n```"},
        {"role": "assistant", "metadata": "now", "content": "```python\ntool_call()\n```"},
        {"role": "observation", "content": "20"},
    ]
    assert prompt_ids(tokenizer, called) == prompt_ids(tokenizer, written)
    assert encode_messages(tokenizer, called) == encode_messages(tokenizer, written)
    silent = [user, {"role": "assistant", "content": "", "tool_calls": calls[:1]}]
    assert encode_messages(tokenizer, silent) == encode_messages(tokenizer, [user, written[2]])


def test_unknown_roles_are_refused(tokenizer):
    with pytest.raises(RowProblem, match="turn 1: role 'critic' has no marker"):
        prompt_ids(tokenizer, [{"role": "critic", "content": "x"}])


def test_stops_and_replies(tokenizer):
    assert glm_version(tokenizer) == 3
    assert stop_ids(tokenizer) == [EOS, USER, OBSERVATION]
    ids, _ = encode_messages(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "你好\n b"}]
    )
    reply = ids[len(prompt_ids(tokenizer, [{"role": "user", "content": "a"}])) :]
    assert said(tokenizer, reply) == said(tokenizer, [*reply[:-1], USER, *reply]) == "你好\n b"
    assert said(tokenizer, []) == ""


def test_other_tokenizers_are_not_glm():
    class Other:
        init_kwargs: dict[str, object] = {}  # noqa: RUF012

    assert glm_version(Other()) is None


# --- GLM-4 ---


def test_glm4_turns(glm4):
    g, sop, system, user, assistant, observation, end = 258, 260, 262, 263, 264, 265, 256
    assert stop_ids(glm4) == [end, user, observation]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "你"},
        {"role": "assistant", "content": "b"},
    ]
    body = [g, sop, system, 10, ord("s"), user, 10, *"你".encode(), assistant]
    assert prompt_ids(glm4, messages[:2]) == body
    ids, labels = encode_messages(glm4, messages)
    assert ids == [*body, 10, ord("b"), user]  # the published demo closes a sample with <|user|>
    assert labels == [-100] * len(body) + [10, ord("b"), user]
    assert said(glm4, ids[len(body) :]) == "b"


def test_glm4_tools(glm4):
    wrapped = [{"type": "function", "function": WEATHER}]
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "20"},
    ]
    ids, labels = encode_messages(glm4, messages, wrapped)
    listed = json.dumps(WEATHER, indent=4, ensure_ascii=False)
    assert glm4.decode(ids) == (
        "[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具\n\n## get_weather\n\n" + listed +
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|system|>\ns<|user|>\nq"
        '<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n20<|user|>'
    )  # fmt: skip
    assert glm4.decode([label for label in labels if label != -100]) == 'get_weather\n{"city": "北京"}<|observation|>'


# --- ChatGLM2 ---

ROUNDS = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "sop?"},
    {"role": "assistant", "content": "好的"},
]
PROMPT = "[Round 1]\n\n问：你好\n\n答：hello there\n\n[Round 2]\n\n问：sop?\n\n答："


def test_chatglm2_prompts_are_one_text_of_rounds(chatglm2):
    assert glm_version(chatglm2) == 2
    assert prompt_ids(chatglm2, ROUNDS[:1]) == chatglm2("[Round 1]\n\n问：你好\n\n答：")["input_ids"]
    assert prompt_ids(chatglm2, ROUNDS[:3]) == chatglm2(PROMPT)["input_ids"]
    assert stop_ids(chatglm2) == [EOS]


def test_chatglm2_labels(chatglm2):
    prompt, reply = prompt_ids(chatglm2, ROUNDS[:3]), [*text(chatglm2, "好的"), EOS]
    ids, labels = encode_messages(chatglm2, ROUNDS, train_on="last")
    assert ids == prompt + reply
    assert labels == [-100] * len(prompt) + reply
    assert said(chatglm2, reply) == "好的"
    # Earlier replies stand inside the prompt; their own tokens carry loss, what surrounds them does not.
    ids, labels = encode_messages(chatglm2, ROUNDS)
    assert ids == prompt + reply
    earlier = [label for label in labels[: len(prompt)] if label != -100]
    assert chatglm2.decode(earlier) == "hello there"
    assert labels[len(prompt) :] == reply
    untrained = [*ROUNDS[:1], {**ROUNDS[1], "train": False}, *ROUNDS[2:]]
    assert encode_messages(chatglm2, untrained)[1] == [-100] * len(prompt) + reply
    everything = encode_messages(chatglm2, ROUNDS, train_on="all")[1]
    assert everything == [-100] * 2 + ids[2:]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([{"role": "system", "content": "s"}, *ROUNDS], None, "turn 1 is system.*alternate"),
        ([*ROUNDS[:2], ROUNDS[1], ROUNDS[1]], None, "turn 3 is assistant"),
        ([*ROUNDS[:2], ROUNDS[1]], None, "ends with the user's turn"),
        (ROUNDS, [WEATHER], "has no tools"),
        (ROUNDS[:3], None, "the last turn is not the assistant's"),
    ],
)
def test_what_chatglm2_cannot_hold_is_refused(chatglm2, messages, tools, reason):
    with pytest.raises(RowProblem, match=reason) as error:
        encode_messages(chatglm2, messages, tools)
    assert error.value.fix


def test_replies_are_scored_with_the_end_that_pairs_have_but_for_separators(chatglm2, tokenizer, glm4):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for made, end in ((chatglm2, None), (tokenizer, None), (glm4, glm4.convert_tokens_to_ids("<|user|>"))):
        encoder = make_encoder(made)
        last = scored_ids(encoder.encode(Conversation(turns)), encoder.separator)[-1]
        assert scored_end(encoder) == end
        assert last == (text(made, "a")[-1] if end is None else end)
