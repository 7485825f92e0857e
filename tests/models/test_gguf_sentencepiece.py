"""Sentencepiece vocabularies as GGUF files: the ids of llama.cpp are those of training, or the file is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from finetune.errors import UserError
from finetune.models import sources
from finetune.models.gguf import tokenizer as reading
from finetune.models.gguf.export import write_model
from finetune.models.gguf.header import read_header
from finetune.models.sentencepiece_tokenizer import build
from finetune.models.tokenizers import load_tokenizer
from finetune.recipe.sections import ModelConfig

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERS = ("<|im_start|>", "<|im_end|>")
TEXTS = (
    "Hello world", " Hello", "  Hello  world", "\n", "\n\nHello\n", "北京的水壶", "🙂 emoji 👩‍👩‍👧",
    "naïve ünïcode Ω", "\thi", " ", "   ", "a  b   c    d", "订单B98：退款128元。", "\u200b½²", "한국어",
)  # fmt: skip
SETTINGS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> bytes:
    text = "the customer ordered a kettle, it arrived broken 北京 的 水壶 订单 退款 客户 user assistant INST"
    words = text.split()
    lines = [" ".join(words[i * k % len(words)] for k in range(9)) + "  " + str(i * 7) for i in range(400)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=buffer, minloglevel=2, hard_vocab_limit=False, model_type="bpe",
        byte_fallback=True, vocab_size=420, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True,
    )  # fmt: skip
    return buffer.getvalue()


def base(folder: Path, trained: bytes, template: str, stored: str | None, markers: tuple[str, ...] = ()) -> Path:
    """A random network with this vocabulary.

    Args:
        stored: what puts a space before texts in its tokenizer.json: the normalizer, as published for Llama 2 and its
            kin; `class`, as transformers 5 saves its LlamaTokenizer; nothing, as Gemma; None for tokenizer.model alone.
    """
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(trained)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    told = {**names, "tokenizer_class": "GemmaTokenizer" if stored == "nothing" else "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    made = build(folder)
    core: Any = Tokenizer.from_str(made.backend_tokenizer.to_str())
    core.add_special_tokens([AddedToken(token, normalized=False) for token in markers])
    if stored is not None:
        (folder / "tokenizer.model").unlink()
        if stored == "class":
            core.normalizer = None
            core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        elif stored == "nothing":
            core.normalizer, core.pre_tokenizer = normalizers.Replace(" ", "▁"), None
            core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        core.save(str(folder / "tokenizer.json"))
    settings = {**SETTINGS, "vocab_size": core.get_vocab_size() + 3}  # rows without a token
    torch.manual_seed(0)
    network: Any = LlamaForCausalLM(LlamaConfig(**settings))
    if stored == "nothing":
        network = Gemma3ForCausalLM(Gemma3TextConfig(**settings, query_pre_attn_scalar=32, tie_word_embeddings=True))
    network.save_pretrained(folder)
    return folder


def ids(model: Any, text: str) -> list[int]:
    found: list[int] = model.tokenize(text.encode(), add_bos=False, special=True)
    return found


def chats(tokenizer: Any) -> list[str]:
    said = ("Hello", " x", "\n北京 🙂", "a  b\n\n")
    turns = [[{"role": role, "content": text} for role in ("user", "assistant", "user")] for text in said]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in turns]


@pytest.mark.parametrize(
    ("template", "stored", "markers"),
    [
        (LLAMA, None, ()), (LLAMA, "normalizer", ()), (ZEPHYR, "normalizer", ()), (TURNS, "normalizer", MARKERS),
        (TURNS, "nothing", MARKERS),
    ],
)  # fmt: skip
def test_llama_cpp_reads_the_same_tokens(
    template: str, stored: str | None, markers: tuple[str, ...], trained: bytes, tmp_path: Path
) -> None:
    """Also behind the tokens of a turn; and so does who reads the file back to train on it."""
    folder = base(tmp_path / "a base", trained, template, stored, markers)
    own: Any = load_tokenizer(ModelConfig(name=str(folder)))
    written = write_model(folder, tmp_path / "x.gguf", "f32")
    assert "joined by scores" in written.rule
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    back = reading.rebuild({"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "x.gguf"}, read(tmp_path))
    back.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (*TEXTS, *chats(own)):
        wanted = own(text, add_special_tokens=False)["input_ids"]
        assert ids(theirs, text) == wanted, text
        for other in (back, saved):
            assert other(text, add_special_tokens=False)["input_ids"] == wanted, text
            assert other.decode(wanted) == own.decode(wanted)


def read(folder: Path) -> Any:
    return read_header(folder / "x.gguf")


def test_a_space_before_texts_alone(trained: bytes, tmp_path: Path) -> None:
    """What transformers 5 saves: llama.cpp has it before every stretch of text or before none. Chats come first."""
    folder = base(tmp_path / "chats", trained, TURNS, "class", MARKERS)
    own: Any = load_tokenizer(ModelConfig(name=str(folder)))
    written = write_model(folder, tmp_path / "x.gguf", "f32")
    assert "what is no chat begins without its first space" in written.rule
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    assert all(ids(theirs, text) == own(text, add_special_tokens=False)["input_ids"] for text in chats(own))
    other = base(tmp_path / "plain", trained, ZEPHYR, "class")  # its chats begin with text
    with pytest.raises(UserError, match=r"gives other ids than llama.cpp's sentencepiece would for '<\|user\|>"):
        write_model(other, tmp_path / "y.gguf", "f32")


def test_the_tokenizer_is_the_one_that_is_stored(trained: bytes, tmp_path: Path) -> None:
    """transformers' class for Llama leaves out the space behind <s>, which the file of the base has."""
    folder = base(tmp_path / "base", trained, LLAMA, "normalizer")
    stored, own = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(ModelConfig(name=str(folder)))
    for text in ("<s>[INST] hi [/INST]", "  hi", "</s> hi"):
        wanted = stored.encode(text, add_special_tokens=False).ids
        assert own.encode(text, add_special_tokens=False) == wanted
    assert AutoTokenizer.from_pretrained(folder).encode("<s>[INST]", add_special_tokens=False) != own.encode(
        "<s>[INST]", add_special_tokens=False
    )


def test_a_published_file_as_a_base(trained: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that says nothing of the space has it, as llama.cpp's converter leaves it out for Llama 2."""
    monkeypatch.setattr("finetune.models.gguf.cache.cache_folder", lambda: tmp_path / "cache")
    folder = base(tmp_path / "base", trained, LLAMA, None)
    write_model(folder, tmp_path / "x.gguf", "f32")
    own, again = (load_tokenizer(ModelConfig(name=str(path))) for path in (folder, tmp_path / "x.gguf"))
    for text in (*TEXTS, *chats(own)):
        assert again(text)["input_ids"] == own(text)["input_ids"]
    shutil.copytree(sources.folder(ModelConfig(name=str(tmp_path / "x.gguf"))), tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")(" x")["input_ids"] == own(" x")["input_ids"]
