"""The tokenizers of the built-in tiny bases, trained on the world of `finetune.builtin.world`."""

import struct
from collections.abc import Iterable
from typing import Any

VOCABULARY = 1024
# Ids 0 to 3. The separator of documents is not the padding: transformers gives padding no gradient, and the separator
# is the first token of every block, which attention needs as its resting place.
SEPARATOR, START, END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"

# A value must tokenise the same in a ticket and in JSON, whatever stands beside it, or it cannot be copied token by
# token. So nothing merges across these borders: one Han character, one digit, one word (a capital begins a new one), a
# run of anything else.
# A line break stands alone, too: the header of a turn ends with one, and merged with the `{"` of an answer it would be
# another token in training than in generation.
PIECES = r"\p{Han}|[0-9]|[A-Z]?[a-z]+|[A-Z]|\n|[^A-Za-z0-9\p{Han}\n]+"

# Plain ChatML; the generation marks let trainers find the assistant's tokens, the end of the turn included.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}"
    "{{- '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], characters: Iterable[str] = ()) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with a token for (nearly) each of `characters`: for tiny-llama and
    tiny-qwen. Returns a PreTrainedTokenizerFast with ChatML template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[SEPARATOR, START, END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    # Each character 600 times: often enough to be merged into one token before rarer letter pairs are.
    tokenizer.train_from_iterator([*texts, *["".join(characters)] * 600], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=SEPARATOR, pad_token=PADDING,
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def build_sentencepiece(texts: Iterable[str], characters: Iterable[str] = ()) -> bytes:
    """The bytes of a `tokenizer.model`: sentencepiece BPE with byte fallback and ChatGLM's normalizer, same borders:
    for tiny-chatglm3, stored in ChatGLM3's original layout.

    Written by hand because sentencepiece's own trainer merges spaces with words: a name would then be other tokens
    after a space than after a quote. The merges are learned by `tokenizers`; no piece crosses a border of PIECES.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    known = sorted({*characters, *map(chr, range(33, 127)), "▁"})
    specials, letters = 3 + 256, max(len(known), VOCABULARY * 2 // 5)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - specials, limit_alphabet=letters, initial_alphabet=known, show_progress=False
    )
    # sentencepiece sees "▁" for a space; a line break has no piece of its own and splits.
    lines = ("▁" + line.replace(" ", "▁") for text in texts for line in text.splitlines())
    tokenizer.train_from_iterator(lines, trainer)
    ranks = tokenizer.get_vocab()
    pieces = sorted(ranks, key=ranks.__getitem__)  # single characters first, then merges by rank
    merged, single = [p for p in pieces if len(p) > 1], [p for p in pieces if len(p) == 1]
    rows = [("<unk>", 0.0, _UNKNOWN), ("<s>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)]
    rows += [(piece, -float(rank), _NORMAL) for rank, piece in enumerate(merged + single, 1)]
    return _model_proto(rows)


_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # sentencepiece_model.proto, SentencePiece.Type


def _model_proto(rows: list[tuple[str, float, int]]) -> bytes:
    """sentencepiece's ModelProto of (piece, score, type) rows, in protobuf's wire format."""

    def number(field: int, value: int) -> bytes:
        return _varint(field << 3) + _varint(value)

    def text(field: int, value: bytes) -> bytes:
        return _varint(field << 3 | 2) + _varint(len(value)) + value

    def piece(name: str, score: float, kind: int) -> bytes:
        return text(1, name.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind)

    bpe, byte_fallback = number(3, 2), number(35, 1)
    trainer = bpe + number(4, len(rows)) + byte_fallback
    dummy_prefix, keep_spaces, escape = number(3, 1), number(4, 0), number(5, 1)
    normalizer = text(1, b"identity") + dummy_prefix + keep_spaces + escape
    return b"".join(text(1, piece(*row)) for row in rows) + text(2, trainer) + text(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
