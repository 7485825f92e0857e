"""The tiny bases' tokenizers: a value is the same tokens wherever it stands, and chat is plain ChatML."""

from itertools import islice

import pytest
import sentencepiece

from finetune.builtin import tokenizers
from finetune.builtin.world import HAN, documents
from finetune.models.chatglm import tokenizer as chatglm_tokenizer

TEXTS = list(islice(documents(0), 1_500))


@pytest.fixture(scope="module")
def chatml():
    return tokenizers.build_tokenizer(TEXTS, HAN)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    file.write_bytes(tokenizers.build_sentencepiece(TEXTS, HAN))
    return file


@pytest.fixture(scope="module")
def chatglm(model_file):
    return chatglm_tokenizer.build_tokenizer(model_file.parent, version=3)


@pytest.mark.parametrize("name", ["chatml", "chatglm"])
@pytest.mark.parametrize(
    "value", ["Tomika", "QK3041", "王伟明", "Jkk", "March 14", "2024-03-14", "99.50", "red kettle"]
)
def test_a_value_is_the_same_tokens_in_a_ticket_and_in_json(request, name, value):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(f'"{value}"', add_special_tokens=False)
    text = [tokenizer.decode([i]) for i in ids]
    core = ids[next(i for i, t in enumerate(text) if '"' in t) + 1 : -1]
    for context in (f"from {value}, for", f'{{"name": "{value}", "a"', f"客户{value}。", f"\n{value}\n"):
        found = tokenizer.encode(context, add_special_tokens=False)
        assert any(found[i : i + len(core)] == core for i in range(len(found)))


def test_chat_is_plain_chatml_and_marks_the_answer_with_its_end(chatml):
    messages = [
        {"role": "system", "content": " s\n"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " a "},
        {"role": "user", "content": "再问"}, {"role": "assistant", "content": ""},
    ]  # fmt: skip
    plain = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert chatml.apply_chat_template(messages, tokenize=False) == plain
    assert chatml.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).endswith(
        "hi<|im_end|>\n<|im_start|>assistant\n"
    )
    out = chatml.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert chatml.decode(trained) == " a <|im_end|><|im_end|>"


def test_the_roles_of_the_special_tokens_are_played_by_different_tokens(chatml):
    assert len({chatml.bos_token_id, chatml.eos_token_id, chatml.pad_token_id}) == 3
    assert chatml.eos_token == "<|im_end|>"


def test_world_characters_are_single_tokens_and_all_text_survives(chatml, chatglm):
    for tokenizer in (chatml, chatglm):
        assert len(tokenizer) <= 1088
        for text in [*TEXTS[:50], "🙂 é ß 鑫 \t\n"]:
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert all(len(chatml.encode(c)) == 1 for c in HAN)


def test_the_tokenizer_model_is_one_for_sentencepiece(model_file, chatglm):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in TEXTS[:100]:
        assert processor.encode(text) == chatglm.encode(text, add_special_tokens=False)
        assert processor.decode(processor.encode(text)) == text
    assert [processor.unk_id(), processor.bos_id(), processor.eos_id()] == [0, 1, 2]


@pytest.mark.parametrize("answer", ['{"name": "A"}', "\n\n", " x", "。好", "A", "9", "...\n"])
def test_a_prompt_is_the_beginning_of_its_conversation(chatml, answer):
    """Otherwise generation begins with tokens that training never saw."""
    asked = [{"role": "user", "content": "q"}]
    prompt = chatml.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    whole = chatml.apply_chat_template([*asked, {"role": "assistant", "content": answer}])["input_ids"]
    assert whole[: len(prompt)] == prompt
