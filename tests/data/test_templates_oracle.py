"""trl's published chat templates as an oracle: ids are the stock ids, trained is what its twins mark.

Its `<name>_training.jinja` twins carry {% generation %} marks. Where the two differ, the difference stands below as
data, with its reason; whatever is not listed must be equal.
"""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from chat_kit import assistant, byte_level, system, trained_ranges, user

from finetune.data import chat, templates
from finetune.data.thinking import asked
from finetune.data.types import Conversation, RowProblem

PUBLISHED = Path(trl.__file__).parent / "chat_templates"
SKIPPED = {
    **dict.fromkeys(
        ("idefics3", "llava_next", "smolvlm", "qwen2_5_vl", "qwen3_vl", "lfm2_2_5_vl"),
        "of vision models only; their contents are lists of parts",
    ),
    "diffusion_gemma": "not of a causal model",
}
NAMES = [
    file.stem
    for file in sorted(PUBLISHED.glob("*.jinja"))
    if not file.stem.endswith("_training") and file.stem not in SKIPPED
]


def result(content: str, number: int) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": f"callnr00{number}", "content": content}


def call(number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": f"callnr00{number}", "type": "function", "function": function}


ONE, TWO = call(1, city="Oslo", days=2), call(2, city="北京")
CITY = {"type": "string", "description": "City."}
PARAMETERS = {"type": "object", "properties": {"city": CITY, "days": {"type": "integer"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}]
Case = tuple[list[dict[str, Any]], Any]
PLAIN: dict[str, Case] = {
    "one": ([user("Hi?"), assistant("Yes.")], None),
    "turns": (
        [user("One?"), assistant("Two."), user("One?"), assistant("Two."), user("Go on"), assistant("Done")], None),
    "system": ([system("Be brief."), user("Hi?"), assistant("Yes."), user("And?"), assistant("No.")], None),
    "empty": ([user("Hi?"), assistant("")], None),
    "empty_early": ([user("Hi?"), assistant(""), user("And?"), assistant("No.")], None),
    "edges": ([user(" Hi?\n"), assistant("\n Yes. \n"), user("\tAnd?"), assistant("  No.  ")], None),
    "edges_of_system": ([system(" S \n"), user("Hi?"), assistant("Yes.\n\n")], None),
    "chinese": (
        [system("简短。"), user("你好，怎么样？"), assistant("很好 🙂\n谢谢。"), user("继续"), assistant("好。")],
        None),
}  # fmt: skip
THINKING: dict[str, Case] = {
    "think": ([user("Hi?"), assistant("Yes.", reasoning_content="A greeting.")], None),
    "think_both": (
        [user("Hi?"), assistant("Yes.", reasoning_content="A greeting."),
         user("And?"), assistant("No.", reasoning_content="More.")], None),
    "think_last": ([user("Hi?"), assistant("Yes."), user("And?"), assistant("No.", reasoning_content="More.")], None),
    "think_first": (
        [user("Hi?"), assistant("Yes.", reasoning_content="A greeting."), user("And?"), assistant("No.")], None),
    "think_tags": ([user("Hi?"), assistant("<think>\nA greeting.\n</think>\n\nYes.")], None),
}  # fmt: skip
CALLS: dict[str, Case] = {
    "tools": ([system("Be brief."), user("Hi?"), assistant("Yes.")], TOOLS),
    "call": ([user("Weather?"), assistant("", tool_calls=[ONE]), result("rain", 1), assistant("It rains.")], TOOLS),
    "call_said": (
        [user("Weather?"), assistant("I look.", tool_calls=[ONE]), result("rain", 1), assistant("It rains.")], TOOLS),
    "calls": (
        [user("Weather?"), assistant("", tool_calls=[ONE, TWO]), result("rain", 1), result("sun", 2),
         assistant("Rain and sun.")], TOOLS),
    "call_turns": (
        [user("Weather?"), assistant("", tool_calls=[ONE]), result("rain", 1), assistant("It rains."),
         user("And?"), assistant("", tool_calls=[TWO]), result("sun", 2), assistant("Sun.")], TOOLS),
    "call_last": ([user("Weather?"), assistant("", tool_calls=[ONE])], TOOLS),
    "think_call": (
        [user("Weather?"), assistant("", tool_calls=[ONE], reasoning_content="I look."), result("rain", 1),
         assistant("It rains.", reasoning_content="Rain.")], TOOLS),
}  # fmt: skip
CASES = PLAIN | THINKING | CALLS

# --- what differs, and why ---

AS_TEXT: dict[str, tuple[bool, bool, bool]] = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma3", "phi3", "phi3_5"), (False, False, False)),
    "llama3": (False, False, True),  # any role has a header
    "deepseek_r1_distill": (False, False, True),  # calls only in turns whose content is null, unfinished
    "deepseekv3": (False, True, True),
    "lfm2": (True, False, True),
}
"""Whether a template shows tools, calls and results, where it does not show all: the rest is written into contents, so
that nothing is dropped without a word. The stock ids are then those of these contents."""
TEXT_ARGUMENTS = {"deepseekv3"}
"""Templates that join arguments to text: they take JSON, and raise for the objects that all others take."""
TAGS_UNREAD = {
    "gemma4_v5", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano",
    "nemotron_3_super", "nemotron_3_ultra", "qwen3_8",
}  # fmt: skip
"""Templates that have a place for thinking and do not look for tags in contents: those would be a part of the answer,
behind an empty block in Qwen3.8. The stock ids are then those of the conversation with reasoning_content."""
REFUSED = {
    **{("gemma", case): "System role not supported" for case in CASES if case == "system" or case in CALLS},
    ("gemma", "edges_of_system"): "System role not supported",
    ("gemma", "chinese"): "System role not supported",
    ("llama3_1", "calls"): "only supports single tool-calls",
    ("llama3_2", "calls"): "only supports single tool-calls",
    # The second call of a conversation is written without its header: the template forgets to reset a flag.
    ("deepseekv3", "call_turns"): "prompt is not how its record of the reply begins",
    # What is said beside a call stands behind its result, inside the next turn.
    **{(f"gemma4{v}", "call_said"): "writes turn 2 differently" for v in ("", "_v3", "_v4", "_v5")},
}
ENDS = {"glm4moe": ("<|user|>", "<|observation|>")}
"""What is added to the stock ids where nothing ends the last turn: GLM's replies and calls end where the next role
begins."""
GIVEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gptoss", "muse_glimmer"), ("<|start|>assistant",)),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>")),
    "qwen2_5": ("\n",),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), ("<think>\n", "<think>\n\n</think>\n\n")),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "<think>\n"),
    **dict.fromkeys(
        (name for name in NAMES if name.startswith("nemotron")), ("<think>\n", "<think>", "<think></think>")
    ),
}
"""What twins mark at the beginning of a turn though the prompt gives it: it is not the model's to write."""
TEXT_END = dict.fromkeys(("phi3", "phi3_5"), "\n<eos>")
"""What twins mark behind the last turn though it ends the text: generation has stopped before."""
HISTORY = {"gptoss": "<|end|>"}
"""What twins mark at the end of earlier replies though the model never ends one so: it writes <|return|>, which the
template keeps for the last reply."""
BLOCKS = dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"), "<|im_start|>assistant\n")
"""Twins that write thinking, if empty, into every turn -> what stands before a turn without it. The stock templates,
and so our ids, drop it before the last question."""
BLOCK = re.compile(r"<think>.*</think>\s*", re.DOTALL)
OTHER = {
    ("deepseek_r1_distill", "think_tags"): (  # the stock template drops the thinking of every recorded reply
        "\n\nYes.<｜end▁of▁sentence｜>",
        "<｜Assistant｜><think>\nA greeting.\n</think>\n\nYes.<｜end▁of▁sentence｜>",
    ),
}
"""(template, conversation) -> what ours and its twin train there."""
GEMMA_CALLS = {
    "callnr001": '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>',
    "callnr002": '<|tool_call>call:weather{city:<|"|>北京<|"|>}<tool_call|>',
}
LLAMA_CALLS = {
    "callnr001": '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}',
    "callnr002": '{"name": "weather", "parameters": {"city": "北京"}}',
}
GEMMA_THOUGHT = "<|channel>thought\n{}\n<channel|>"
BY_HAND = {
    **{f"gemma4{v}": ("<turn|>", "<|tool_response>", GEMMA_THOUGHT, GEMMA_CALLS) for v in ("", "_v3", "_v4", "_v5")},
    "gemma4_v2": ("<turn|>", "<turn|>", GEMMA_THOUGHT, GEMMA_CALLS),
    **dict.fromkeys(("llama3_1", "llama3_2"), ("<|eot_id|>", "<|eot_id|>", "", LLAMA_CALLS)),
}
"""Templates without a twin -> what ends a reply, what a call, how thinking and calls are written."""
EARLIER = {
    "turns",
    "system",
    "empty_early",
    "edges",
    "chinese",
    "think_both",
    "think_first",
    "think_last",
    "call_turns",
}
UNPROMPTED = {
    # The prompt opens thinking, which the record of no reply holds.
    "deepseek_r1_distill": set(CASES),
    "deepseekv3": set(CASES) - {"call_turns"},
    # A reply without thinking beside one with it: the prompt opens thinking with a line break, the record has none.
    **{name: {"think_both", "think_last", "think_first"} for name in NAMES if name.startswith("nemotron")},
    # The prompt opens thinking, which earlier turns are recorded without.
    **dict.fromkeys(("qwen3_5_think", "qwen3_5_nothink", "qwen3_6"), EARLIER),
    # What is said or thought before a call is shown until the final reply, and then no more.
    "gptoss": {"call_said", "think_call"},
}
"""Conversations with turns that do not begin as their prompt does: none is where the template is not to blame."""


# --- tokenizers ---

SOFT = r"</?(?:think|tool_call|tool_response)>"
CONTROL = (
    r"<\|[\w▁]+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|"
    r"<(?:turn|tool|tool_call|tool_response|channel)\|>|<\|(?:turn|tool|tool_call|tool_response|channel)>"
)
ENDINGS = ("<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|eot|>")


@functools.cache
def made(name: str) -> tuple[Any, chat.TemplateEncoder]:
    """One token per byte and the template's control tokens, with the stock template; and our encoder for it."""
    template = (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")
    soft = sorted(set(re.findall(SOFT, template)))
    control = sorted(set(re.findall(CONTROL, template)) - set(soft))
    eos = next((token for token in ENDINGS if token in control), "<eos>")
    tokenizer = byte_level(template, tuple(control), tuple(soft), bos="<bos>", eos=eos)
    encoder = chat.make_encoder(tokenizer)
    assert isinstance(encoder, chat.TemplateEncoder)
    return tokenizer, encoder


def written(name: str, messages: list[dict[str, Any]], tools: Any) -> Case:
    """The conversation as this template can hold it."""
    if name in TAGS_UNREAD and messages == THINKING["think_tags"][0]:
        messages = THINKING["think"][0]
    if name in AS_TEXT and (tools or any("tool_calls" in m for m in messages)):
        return templates.tools_as_text(messages, tools, *AS_TEXT[name])
    return messages, tools


def told(name: str, case: Case) -> tuple[bool | None, dict[str, bool]]:
    """(whether the row is written as one with thinking, the template's variable that says so): data.thinking."""
    encoder = made(name)[1]
    on = encoder.mode(Conversation(*case))[1]
    return on, encoder.thinking.variables(on)


def stock(name: str, case: Case, switch: dict[str, bool], prompt: bool = False) -> list[int]:
    """The ids of apply_chat_template."""
    messages, tools = written(name, *case)
    if name in TEXT_ARGUMENTS:
        messages = templates.arguments_as_text(messages)
    tokenizer = made(name)[0]
    ids = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=False, add_generation_prompt=prompt, **switch
    )
    return list(ids)


def marked(name: str, case: Case) -> tuple[list[int], list[str]]:
    """(ids, the texts that are marked) of the twin, by transformers' own mask."""
    tokenizer, (messages, tools) = made(name)[0], written(name, *case)
    twin = PUBLISHED / f"{name}_training.jinja"
    found = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True,
        chat_template=twin.read_text(encoding="utf-8") if twin.is_file() else None, **told(name, case)[1],
    )  # fmt: skip
    ids, mask = list(found["input_ids"]), [0, *found["assistant_masks"], 0]
    edges = [i for i, (a, b) in enumerate(itertools.pairwise(mask)) if a != b]
    return ids, [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_every_published_template_is_compared_or_skipped_with_a_reason() -> None:
    published = {file.stem for file in PUBLISHED.glob("*.jinja") if not file.stem.endswith("_training")}
    assert set(NAMES) | set(SKIPPED) == published
    assert len(NAMES) >= 34


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_stock_ids(name: str) -> None:
    _, encoder = made(name)
    assert (encoder.shows_tools, encoder.shows_calls, encoder.shows_results) == AS_TEXT.get(name, (True, True, True))
    assert encoder.text_arguments == (name in TEXT_ARGUMENTS)
    assert encoder.thinking.reads_tags == (name not in TAGS_UNREAD)
    for label, (messages, tools) in CASES.items():
        wrong = REFUSED.get((name, label))
        if wrong is not None:
            with pytest.raises(RowProblem, match=re.escape(wrong)):
                encoder.encode(Conversation(messages, tools))
            continue
        row = encoder.encode(Conversation(messages, tools))
        added = []
        if name in ENDS:
            added = [encoder.tokenizer.convert_tokens_to_ids(ENDS[name]["tool_calls" in messages[-1]])]
        assert row.input_ids == stock(name, (messages, tools), told(name, (messages, tools))[1]) + added, label


def turns_of(row: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """(the text before, the text) of every trained stretch."""
    ids = row.input_ids
    return [(tokenizer.decode(ids[:a]), tokenizer.decode(ids[a:b])) for a, b in trained_ranges(row)]


def agreed(name: str, before: str, ours: str, theirs: str, ends: tuple[str, ...], last: bool) -> bool:
    """Whether a turn is trained as the twin marks it, but for what is listed above."""
    theirs = theirs.removesuffix(TEXT_END.get(name, ""))
    if theirs.endswith(tuple(f"{end}\n" for end in ends)):
        theirs = theirs[:-1]  # the line break behind the end of turn is the template's: generation has stopped
    if not last:
        theirs = theirs.removesuffix(HISTORY.get(name, ""))
    if ours == theirs:
        return True
    extra = theirs.removesuffix(ours)
    given = extra in GIVEN.get(name, ()) and before.endswith(extra)
    dropped = name in BLOCKS and BLOCK.fullmatch(extra) is not None and before.endswith(BLOCKS[name])
    return extra + ours == theirs and (given or dropped)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_HAND])
def test_what_is_trained_is_what_the_twin_marks(name: str) -> None:
    tokenizer, encoder = made(name)
    other = set()
    for label, case in CASES.items():
        if (name, label) in REFUSED:
            continue
        ours, (_, theirs) = turns_of(encoder.encode(Conversation(*case)), tokenizer), marked(name, case)
        assert len(ours) == len(theirs) == sum(m["role"] == "assistant" for m in case[0]), label
        pairs = list(zip(ours, theirs, strict=True))
        for number, ((before, mine), yours) in enumerate(pairs):
            if not agreed(name, before, mine, yours, encoder.end_tokens, number == len(pairs) - 1):
                other.add((label, mine, yours))
    assert other == {(label, *texts) for (of, label), texts in OTHER.items() if of == name}


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_trained_where_there_is_no_twin(name: str) -> None:
    """What the model says, as the template writes it, and the token that ends the turn."""
    tokenizer, encoder = made(name)
    end, call_end, thought, calls = BY_HAND[name]
    for label, case in CASES.items():
        if (name, label) in REFUSED:
            continue
        row = encoder.encode(Conversation(*case))
        text, wanted = tokenizer.decode(row.input_ids), []
        for message in written(name, *case)[0]:
            if message["role"] != "assistant":
                continue
            thinking = thought.format(message["reasoning_content"]) if "reasoning_content" in message else ""
            called = "".join(calls[c["id"]] for c in message.get("tool_calls", []))
            said = "" if called and name.startswith("llama") else message["content"].strip()
            wanted.append((thinking if thinking in text else "") + called + said + (call_end if called else end))
        found = turns_of(row, tokenizer)
        opened = thought.partition("{}")[0]  # by the prompt, of gemma4_v5 behind a result
        given = [opened if opened and before.endswith(opened) else "" for before, _ in found]
        assert [name for name in given if name] == [opened] * ((name, label) == ("gemma4_v5", "think_call")), label
        assert [start + ours for start, (_, ours) in zip(given, found, strict=True)] == wanted, label


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_stock_prompts_and_what_they_do_not_open_is_told(name: str) -> None:
    _, encoder = made(name)
    found = set()
    for label, (messages, tools) in CASES.items():
        if (name, label) in REFUSED:
            continue
        row = encoder.encode(Conversation(messages, tools))
        on, switch = told(name, (messages, tools))
        asking = asked(encoder, on, "")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        otherwise = []
        for turn, (start, _) in zip(turns, trained_ranges(row), strict=True):
            prompt = asking.prompt_ids(messages[:turn], tools)
            assert prompt == stock(name, (messages[:turn], tools), switch, prompt=True), label
            if row.input_ids[: len(prompt)] == prompt:
                assert start == len(prompt), label
            else:
                otherwise.append(turn)
                found.add(label)
        assert list(row.unprompted) == otherwise, label
    assert found == UNPROMPTED.get(name, set())


OURS = {
    **{name: name for name in ("gemma", "gemma3", "llama3", "llama3_1", "phi3", "phi3_5", "qwen2_5", "qwen3")},
    "qwen3_instruct": "qwen3_instruct_2507",
}


@pytest.mark.parametrize("name", OURS)
def test_our_copies_render_what_the_published_templates_do(name: str) -> None:
    _, encoder = made(OURS[name])
    copy = templates.shipped()[name]
    assert encoder.spans.annotated == copy
    for label, (messages, tools) in CASES.items():
        ends = [None, *(i for i, message in enumerate(messages) if message["role"] == "assistant")]
        for end in ends:
            given = (messages[:end], tools, encoder.variables, end is not None)
            assert templates.attempt(copy, *given) == templates.attempt(encoder.template, *given), label
