"""Which GGUF files cannot become a base, by name. No torch.

What transformers reads is its own to say: the lists of architectures and tokenizers are its.
"""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError
from finetune.models.gguf.header import KEY, Header

JOIN = "join them first: llama-gguf-split --merge FIRST OUT"
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})(\.gguf)?$")
# Pre-tokenizers that come back with the same ids; transformers falls back to GPT-2's for others without a word.
GPT2_SPLITS = {"gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion"}
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
NUMBER_SPLITS = {"superbpe"}
OTHER_KINDS = {
    "adapter": ("is a LoRA adapter, not a model", "give the GGUF file of its base"),
    "mmproj": ("is the image encoder of a model", "give the GGUF file of the language model"),
    "imatrix": ("holds statistics for quantization, not a model", "give the GGUF file of the model"),
    "controlvector": ("is a control vector, not a model", "give the GGUF file of the model"),
}
ENCODERS = ("bert", "embedding", "t5encoder")
UNUSABLE = {
    "t5": "is an encoder-decoder, and recipes describe one network",
    "umt5": "is an encoder-decoder, and recipes describe one network",
    "deci": "has no native network in transformers",
}


def refuse_part(path: Path) -> None:
    """UserError for one file of several."""
    if SPLIT.search(path.name):
        what = "is one part of a model that was split into several files"
        raise UserError(what, path=path, key=KEY, fix=JOIN)


def check_kind(header: Header) -> None:
    """UserError for what transformers cannot read, by its name."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

    def refuse(what: str, fix: str = "use the model's folder of safetensors") -> None:
        raise UserError(what, path=header.path, key=KEY, fix=fix)

    kind, arch = str(header.values.get("general.type", "model")), header.architecture
    if "general.architecture" not in header.values or not header.tensors:
        refuse("names no architecture or holds no weights (a vocabulary only?)", "give the GGUF file of the model")
    if arch == "clip" or kind in OTHER_KINDS:
        refuse(*OTHER_KINDS["mmproj" if arch == "clip" else kind])
    if any(word in arch for word in ENCODERS) or header.get("pooling_type") not in (None, 0):
        refuse(f"is an encoder ({arch}): it embeds text and does not continue it", "give a language model")
    known = {name for name in GGUF_CONFIG_MAPPING if name not in ("general", "tokenizer")} | set(GGUF_CONFIG_ARCHS)
    if not {arch, arch.replace("-", "_"), arch.replace("moe", "_moe")} & known:
        refuse(f"is of the architecture {arch}, which transformers does not read from GGUF")
    if arch in UNUSABLE:
        refuse(f"is of the architecture {arch}, which {UNUSABLE[arch]}")
    if arch == "llama" and header.get("expert_count", 0):
        refuse(
            "is a mixture of experts in the llama architecture (Mixtral), which transformers does not read from GGUF"
        )
    check_tokenizer(header, refuse)
    if "split.count" in header.values and header.values["split.count"] > 1:
        refuse("is one part of a model that was split into several files", JOIN)
    unread = sorted(name for name in map(kind_name, header.kinds) if not readable(name))
    if unread:
        refuse(f"holds weights of a kind that cannot be read ({', '.join(unread)})")


def check_tokenizer(header: Header, refuse: Any) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

    kind, pre = header.values.get("tokenizer.ggml.model"), header.values.get("tokenizer.ggml.pre")
    if kind is None or kind in ("none", "no_vocab"):
        refuse("holds no tokenizer")
    if kind not in GGUF_TOKENIZER_TYPES:
        refuse(f"has a tokenizer of the kind {kind}, which cannot be rebuilt")
    if kind != "gpt2" or pre in GPT2_SPLITS | DIGIT_SPLITS | NUMBER_SPLITS | set(GGUF_PRE_TOKENIZER_SPLITS):
        return
    if pre in (None, "default"):
        fix = "convert the model again with a llama.cpp of 2024-05 or later, or use its folder of safetensors"
        refuse("does not say how its tokenizer splits text into words (it was made by an early converter)", fix)
    refuse(f"splits text into words as {pre} does, which cannot be rebuilt")


def kind_name(kind: int) -> str:
    return str(importlib.import_module("gguf").GGMLQuantizationType(kind).name)


@functools.cache
def readable(name: str) -> bool:
    """Whether the package gguf makes floats of weights of this kind."""
    gguf = importlib.import_module("gguf")
    kind = gguf.GGMLQuantizationType[name]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def stored_dtype(header: Header) -> str:
    """The precision of the folder: a file of floats keeps its own."""
    kinds = set(map(kind_name, header.kinds))
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return plain[kinds.pop()] if len(kinds) == 1 and kinds <= plain.keys() else "bfloat16"


def stored_bytes(header: Header) -> int:
    return 4 if stored_dtype(header) == "float32" else 2
