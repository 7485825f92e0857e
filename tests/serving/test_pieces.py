"""From tokens to text: whole characters only, stop texts, thinking, calls, the same streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import CHATML, make_tokenizer

from finetune.data.chat import make_encoder
from finetune.data.thinking import USUAL
from finetune.serving.calls import CallFormat, chatglm3_calls, detected, glm4_calls
from finetune.serving.pieces import Decoder, Said, Stripped, UntilStop

TEXT = "héllo 世界 🎉 naïve\n"


def decoder(before: str = "") -> tuple[Any, Decoder]:
    tokenizer = make_tokenizer()  # a token for each byte
    ids = tokenizer.encode(before, add_special_tokens=False)
    return tokenizer, Decoder(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), ids)


@pytest.mark.parametrize("before", ["", "was davor steht: ü"])
def test_no_piece_holds_half_a_character(before: str) -> None:
    tokenizer, pieces = decoder(before)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) == len(TEXT.encode())
    found = [pieces.add(i) for i in ids]
    assert not any("\ufffd" in piece for piece in found)
    assert "".join(found) == TEXT
    assert found.count("") == len(TEXT.encode()) - len(TEXT)
    assert pieces.rest() == ""


def test_a_character_that_is_cut_is_left_out() -> None:
    tokenizer, pieces = decoder()
    ids = tokenizer.encode("ab世", add_special_tokens=False)[:-1]
    assert "".join(map(pieces.add, ids)) + pieces.rest() == "ab"


def test_sentencepiece_keeps_the_space_between_pieces() -> None:
    from finetune.models.tokenizers import load_tokenizer
    from finetune.recipe.sections import ModelConfig

    tokenizer = load_tokenizer(ModelConfig(name="tiny-chatglm3"))
    text = "The parcel went to Paris, 北京 and back."
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = Decoder(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    assert "".join(map(pieces.add, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("parts", "stops", "told"),
    [
        (["abc", "de"], [], "abcde"),
        (["ab", "c", "STO", "P", "x"], ["STOP"], "abc"),
        (["ab STOR", "Y STO"], ["STOP"], "ab STORY STO"),
        (["a\n", "\nb"], ["\n\n", "b"], "a"),
        (["xENDy"], ["END", "x"], ""),
    ],
)
def test_stop_texts_are_never_shown(parts: list[str], stops: list[str], told: str) -> None:
    until, found = UntilStop(stops), ""
    for part in parts:
        found += until.add(part)
        if until.found:
            break
    else:
        found += until.add("", last=True)
    assert found == told
    one = UntilStop(stops)
    assert one.add("".join(parts), last=True) == told


def test_white_space_at_the_ends_is_left_out() -> None:
    for parts in (["\n ", " a", " ", "b\n", "\n"], ["\n  a b\n\n"]):
        strip = Stripped()
        assert "".join(map(strip.add, parts)) == "a b"


def said(text: str, size: int, **options: Any) -> tuple[dict[str, str], list[Any]]:
    sayer, found = Said(USUAL, **{"begun": False, **options}), {}
    for start in range(0, len(text), size):
        for key, part in sayer.add(text[start : start + size]).items():
            found[key] = found.get(key, "") + part
    for key, part in sayer.add("", last=True).items():
        found[key] = found.get(key, "") + part
    return found, sayer.calls()


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_thinking_stands_beside_the_answer(size: int) -> None:
    text = "<think>\nso it is\n</think>\n\nyes, < think\n"
    assert said(text, size)[0] == {"reasoning_content": "so it is", "content": "yes, < think"}
    assert said("so\n</think>yes", size, begun=True)[0] == {"reasoning_content": "so", "content": "yes"}
    assert said("<think>never ends", size)[0] == {"reasoning_content": "never ends"}
    assert said(" plain <think>", size)[0] == {"content": "plain <think>"}


HERMES = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    HERMES.replace("<tool_call>\n", "")
    .replace("\n</tool_call>", "")
    .replace("c.function | tojson", "{'name': c.function.name, 'parameters': c.function.arguments} | tojson")
)
LIST = HERMES.replace("<tool_call>\n{{", "[TOOL_CALLS] [{{").replace("\n</tool_call>", "]")
XML = HERMES.replace("c.function | tojson", "c.function.name + '<arg>v</arg>'")


def format_of(template: str) -> CallFormat | None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return detected(make_encoder(tokenizer))


CALLS = [("find", {"city": "Paris", "n": 2}), ("find", {"city": "世"})]
AS_JSON = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in CALLS]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, "Let me look.\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in AS_JSON)),
        (CHATML, "Let me look.\n" + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in AS_JSON)),
        (LIST, f"Let me look. [TOOL_CALLS] [{', '.join(AS_JSON)}]"),
        (BARE, "; ".join(call.replace("arguments", "parameters") for call in AS_JSON)),
    ],
    ids=["hermes", "no place of its own", "list", "bare"],
)
def test_calls_are_read_back(template: str, text: str, size: int) -> None:
    calls = format_of(template)
    assert calls is not None
    found, called = said(text, size, calls=calls, names=["find"])
    assert found == ({"content": "Let me look."} if text.startswith("Let") else {})
    assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in called] == CALLS
    assert len({c["id"] for c in called}) == 2


@pytest.mark.parametrize(
    "text", ["<tool_call>\n{broken", "see <tool_call> there", "<tool_call>[1]</tool_call>", "a {b}"]
)
def test_what_is_no_call_is_an_answer(text: str) -> None:
    assert said(text, 2, calls=format_of(HERMES), names=["find"]) == ({"content": text}, [])
    assert said(text, 2, calls=format_of(BARE), names=["find"]) == ({"content": text}, [])


def test_json_answers_without_a_mark_are_calls_of_known_tools_only() -> None:
    text = '{"name": "Bob", "parameters": {}}'
    assert said(text, 5, calls=format_of(BARE), names=["find"]) == ({"content": text}, [])


def test_a_format_that_is_not_read_is_known_for_it() -> None:
    assert format_of(XML) is None


def test_chatglm_calls() -> None:
    from finetune.models.tokenizers import load_tokenizer
    from finetune.recipe.sections import ModelConfig

    calls = detected(make_encoder(load_tokenizer(ModelConfig(name="tiny-chatglm3"))))
    assert calls is not None
    text = "find\n```python\ntool_call(city='Paris', n=2)\n```"
    assert calls.reader(text) == [CALLS[0]]
    assert said("Paris, I think", 3, calls=calls, names=["find"]) == ({"content": "Paris, I think"}, [])
    assert glm4_calls('find\n{"city": "Paris", "n": 2}') == [CALLS[0]]
    for bad in ("find\n```python\ntool_call(city=open('x'))\n```", "find\ntool_call(1)", "find", "", "find\n{broken"):
        assert not chatglm3_calls(bad)
        assert not glm4_calls(bad)
