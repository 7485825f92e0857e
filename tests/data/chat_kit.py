"""Tokenizers of every make, built in memory, and short names for turns."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from finetune.data import chat, formats
from finetune.data.types import Encoded

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained_ranges(row: Encoded) -> list[tuple[int, int]]:
    """The stretches of tokens that are trained."""
    marks = [0, *row.mask, 0]
    edges = [i for i, (before, after) in enumerate(itertools.pairwise(marks)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def byte_level(
    template: str | None,
    specials: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str = "</s>",
    rstrip: tuple[str, ...] = (),
) -> Any:
    """One token per byte, as in GPT-2 and its heirs; `plain` tokens are added but not special (like <think>)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = dict.fromkeys([*specials, *([bos] if bos else []), eos, "<pad>"])
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False, rstrip=n in rstrip) for n in names])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>", chat_template=template
    )


def sentencepiece_like(template: str | None, scheme: str = "first", specials: tuple[str, ...] = ()) -> Any:
    """Byte fallback and "▁" for spaces, as in Llama-2 and Mistral. scheme: first or always (the older conversion)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz[]/<>|IANST_",
    ]
    merges = [("▁", "a"), ("▁", "h"), ("h", "e"), ("▁h", "e")]
    words += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "always":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(n, special=True, normalized=False) for n in ("<unk>", "<s>", "</s>", *specials)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@functools.cache
def tokenizer() -> Any:
    """ChatML, one token per byte."""
    return byte_level(CHATML, ("<|endoftext|>", "<|im_start|>"), eos="<|im_end|>")


@functools.cache
def encoder() -> chat.TemplateEncoder:
    made = chat.make_encoder(tokenizer())
    assert isinstance(made, chat.TemplateEncoder)
    return made


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_rows(count: int, name: str = "x") -> list[dict[str, Any]]:
    """Short conversations, all different."""
    return [{"messages": [user(f"{name} question {i}"), assistant(f"answer {i * 7}")]} for i in range(count)]


def converted(row: dict[str, Any], name: str, columns: dict[str, str] | None = None) -> list[Any]:
    """The samples of one row of this format."""
    return list(formats.FORMATS[name].convert(formats.shaped(row, columns)))


def first(row: dict[str, Any], name: str, columns: dict[str, str] | None = None) -> Any:
    return converted(row, name, columns)[0]
