"""The tokenizer of a GGUF file, through transformers, with what that leaves out. Compared with llama.cpp itself in
tests/models/test_gguf_llama_cpp.py."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from finetune.errors import UserError
from finetune.models.gguf.checks import DIGIT_SPLITS, NUMBER_SPLITS
from finetune.models.gguf.header import KEY, Header

# Pre-tokenizers of vocabularies that take a known word whole, and begin a text with a token unless the file denies it.
WHOLE_WORDS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
    "jina-v5-nano",
}
TOKENS = "tokenizer.ggml.tokens"
SPACES = normalizers.Replace(" ", "▁")


def rebuild(where: dict[str, Any], header: Header) -> Any:
    """UserError when a token does not come back with its id."""
    pre, more = header.values.get("tokenizer.ggml.pre"), {}
    whole = header.values["tokenizer.ggml.model"] == "gpt2" and pre in WHOLE_WORDS
    if whole and "tokenizer.ggml.add_bos_token" not in header.values:
        more["add_bos_token"] = True
    tokenizer = AutoTokenizer.from_pretrained(**where, **more)
    if whole:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    if header.values["tokenizer.ggml.model"] == "gpt2" and pre in DIGIT_SPLITS | NUMBER_SPLITS:
        tokenizer.backend_tokenizer.pre_tokenizer = splitter(pre)
    if header.values["tokenizer.ggml.model"] == "llama" and not header.architecture.startswith("gemma"):
        tokenizer = as_sentencepiece(tokenizer, bool(header.values.get("tokenizer.ggml.add_space_prefix", True)))
    check_ids(tokenizer, header)
    return tokenizer


def as_sentencepiece(tokenizer: Any, prefix: bool) -> Any:
    """With a space before every text that begins, or that follows a token of the vocabulary's own, as llama.cpp and
    sentencepiece have it. transformers' class puts none behind tokens, and none where one is already; a class that
    says nothing stays what its tokenizer.json says."""
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []), SPACES])
    backend.pre_tokenizer = None
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=tokenizer.chat_template, **named
    )


def splitter(pre: str) -> Any:
    """The pre-tokenizer of a byte-level vocabulary, as llama.cpp has it under this name."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in DIGIT_SPLITS:  # every digit alone, then as GPT-2 does
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if pre in NUMBER_SPLITS:  # numbers in threes from the right, and nothing else: words may join
        numbers, threes = (pre_tokenizers.Split(Regex(text), "isolated") for text in (r"\p{N}+", THREES))
        return pre_tokenizers.Sequence([numbers, threes, byte_level])
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


THREES = r"(?=(\d{3})+(?!\d))"


def check_ids(tokenizer: Any, header: Header) -> None:
    tokens = read_gguf_metadata(str(header.path), (TOKENS,))[0][TOKENS]
    ours = {number: token for token, number in tokenizer.get_vocab().items()}
    repeated, byte = len(tokens) - len(set(tokens)), bytes_to_unicode()
    wrong = [
        token for number, token in enumerate(tokens)
        if ours.get(number) not in (token, token.replace(" ", "▁"), "".join(byte[b] for b in token.encode()))
    ]  # fmt: skip
    if len(wrong) > repeated:  # of tokens that a file lists twice, one has an id
        shown = ", ".join(map(repr, wrong[:3]))
        what = f"{len(wrong)} tokens of its vocabulary do not come back with their ids ({shown})"
        raise UserError(what, path=header.path, key=KEY, fix="use the model's folder of safetensors")


def ends_of(tokenizer: Any, header: Header) -> list[int]:
    """Ids that end an answer: of the text, and of the turn where the file names it apart."""
    named = [tokenizer.eos_token_id, *(header.values.get(f"tokenizer.ggml.{k}_token_id") for k in ("eot", "eom"))]
    return list(dict.fromkeys(found for found in named if found is not None))
