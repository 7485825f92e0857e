"""A model folder becomes a GGUF file, which is read back through transformers before it is called done."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import AutoConfig

from finetune import __version__
from finetune.errors import UserError
from finetune.models.gguf import layout
from finetune.models.gguf.checks import stored_dtype
from finetune.models.gguf.config import FREQUENCIES
from finetune.models.gguf.header import check_package, read_header
from finetune.models.gguf.places import MADE, TYPES, check_type
from finetune.models.gguf.vocabulary import Render, by_transformers, vocabulary
from finetune.models.tokenizers import load_tokenizer
from finetune.models.weight_files import DERIVED, read_json, shapes, tensors, weight_files
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import task

OF_DTYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.bfloat16}
"""What a stored matrix is read as."""
BLOCK = 32  # weights that share a scale in Q8_0
HALF_STEP = 0.5 + 127 / 2048 + 1e-3
"""Of Q8_0, in units of its scale: rounding to a whole number, and of the scale to float16."""
NORM = 2.0**-22  # Gemma's norms: 1 is added in float32, and taken away again
GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


@dataclass(frozen=True)
class Written:
    """What is in a file, and was found in it again."""

    tensors: int
    texts: int
    """Tokenized alike."""
    rule: str
    """How its tokenizer works."""
    kind: str
    error: float
    """Largest rounding of a weight by the quantization; 0 for floats that fit."""
    begins: bool
    """Whether llama.cpp begins a prompt with the first token by itself."""
    silenced: bool
    """Whether the tokenizer would, and the chat template would not."""


def check_folder(folder: Path, kind: str, path: Any) -> Any:
    """transformers' config. UserError, before any weights are read, for a model that cannot be written."""
    check_package(path)
    check_type(kind)
    layout.check_type(read_json(folder / "config.json"), path)
    config = AutoConfig.from_pretrained(str(folder))
    layout.check(config, path)
    return config


def write_model(
    folder: Path, path: Path, kind: str, *, facts: dict[str, str] | None = None, stops: list[int] | None = None,
    template: str | None = None, render: Render | None = None,
) -> Written:  # fmt: skip
    """Write `path`, which must be nobody's, and prove it. UserError for what cannot be written as it is.

    Args:
        kind: of TYPES; facts: more of the section general (name, license, …); stops: ids that end an answer;
            template: the chat template, by default the tokenizer's own; render: writes conversations by it, within
            limits of time and size; by default transformers, without any.
    """
    config = check_folder(folder, kind, folder)
    files = weight_files(folder)
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    if template is not None:
        tokenizer.chat_template = template
    rows = next(shape[0] for file in files for name, shape in shapes(file).items() if "embed_tokens" in name)
    render = render or by_transformers(tokenizer)
    words = vocabulary(tokenizer, rows, folder, render)
    begins, silenced = first_token(tokenizer, render)
    gguf = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, layout.ARCHITECTURES[config.model_type])
    try:
        general = {"type": "model", "file_type": int(gguf.LlamaFileType[file_type(kind)]), **(facts or {})}
        put_all(writer, {f"general.{key}": value for key, value in general.items()} | {MADE: __version__})
        if kind == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        architecture = writer.arch
        put_all(writer, {f"{architecture}.{key}": value for key, value in layout.values(config, folder).items()})
        put_all(writer, words.values | special(tokenizer, config, stops or [], begins))
        expected, error = write_tensors(writer, files, config, kind, folder)
    finally:
        writer.close()
    check_written(path, expected, tokenizer, words.texts, folder)
    return Written(len(expected), len(words.texts), words.rule, kind, error, begins, silenced)


def file_type(kind: str) -> str:
    return {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{TYPES[kind]}")


def put_all(writer: Any, values: dict[str, Any]) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        (writer.add_array if isinstance(value, list) else adders[type(value)])(key, value)


def first_token(tokenizer: Any, render: Render) -> tuple[bool, bool]:
    """(whether the file asks for it, whether that is only because chats of this model have none): a chat is what the
    model was trained on, and llama.cpp puts the token before a chat as before any text."""
    bos = tokenizer.bos_token
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] if bos is not None else False
    if not adds or not tokenizer.chat_template:
        return adds, False
    text = render([{"role": "user", "content": "a"}], False)
    if text is None:
        return adds, False
    return text.startswith(bos), not text.startswith(bos)


def special(tokenizer: Any, config: Any, stops: list[int], begins: bool) -> dict[str, Any]:
    """Ids with a part to play, and the chat template."""
    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    found = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
        "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id,
        "eot": next((number for number in stops if number != tokenizer.eos_token_id), None),
    }  # fmt: skip
    values: dict[str, Any] = {f"tokenizer.ggml.{k}_token_id": int(v) for k, v in found.items() if v is not None}
    values |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    return values | ({"tokenizer.chat_template": portable(template)} if template else {})


def portable(template: str) -> str:
    """Without the tags that mark what is trained: only transformers knows them. White space is taken as before."""
    return GENERATION_TAG.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", template)


def named_tensors(files: list[Path], config: Any) -> Iterator[tuple[str, Path]]:
    """(name, file) of every weight that is written; a head that is the embedding is not."""
    for file in files:
        for name in shapes(file):
            if not DERIVED.search(name) and not (name == "lm_head.weight" and config.tie_word_embeddings):
                yield name, file


def write_tensors(writer: Any, files: list[Path], config: Any, kind: str, folder: Path) -> tuple[dict[str, Any], float]:
    """(name in the network -> what has to come back, largest rounding by the quantization)

    One matrix is in memory at a time: the table of the file is written first.
    """
    gguf = importlib.import_module("gguf")
    renamed, wanted = layout.names(config), dict(named_tensors(files, config))
    every = {name: shape for file in files for name, shape in shapes(file).items() if name in wanted}
    for name, shape in every.items():
        if (to := renamed(name)) is None:
            layout.refuse_weight(name, config, folder)
        how = gguf.GGMLQuantizationType[stored_as(shape, kind)]
        size = gguf.quants.quant_shape_to_byte_shape(shape, how)
        writer.add_tensor_info(to, size, np.dtype(np.uint8), int(np.prod(size)), how)
    if (factors := layout.frequencies(config)) is not None:
        writer.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    expected: dict[str, Any] = {}
    kinds = {stored_as(shape, kind) for shape in every.values() if len(shape) > 1}
    largest, read_as = 0.0, DTYPES[kinds.pop()] if len(kinds) == 1 else torch.bfloat16
    with task("writing the GGUF file", len(every), "weights", after=1.0) as advance:
        for file in files:
            for name, weight in tensors(file):
                if name not in every:
                    continue
                values = layout.stored(name, weight, config).float().contiguous().numpy()
                if not fits(values, stored_as(every[name], kind)):
                    what = f"{name} holds numbers that {kind} has no place for"
                    raise UserError(what, path=folder, key="--gguf-type", fix="use bf16 or f32")
                how = gguf.GGMLQuantizationType[stored_as(every[name], kind)]
                data = gguf.quants.quantize(values, how).view(np.uint8)
                writer.write_tensor_data(data)
                if how == gguf.GGMLQuantizationType.Q8_0:
                    back = gguf.quants.dequantize(data, how)
                    largest = max(largest, check_rounding(name, values, back, folder))
                    weight = torch.from_numpy(back)
                    if heads := layout.heads_of(name, config) if config.model_type == "llama" else 0:
                        weight = layout.halves(weight, heads)
                else:
                    weight = weight.to(DTYPES[how.name])
                expected[name] = weight if weight.ndim == 1 else digest(weight.to(read_as))
                advance(1)
    if factors is not None:
        writer.write_tensor_data(factors)
    return expected, largest


def fits(values: np.ndarray[Any, Any], how: str) -> bool:
    """Whether all are numbers, also as they are stored."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float16) if how == "F16" else values).all())


def stored_as(shape: tuple[int, ...], kind: str) -> str:
    """Vectors are F32; rows that are no whole number of blocks are F16."""
    if len(shape) < 2:
        return "F32"
    return "F16" if kind == "q8_0" and shape[-1] % BLOCK else TYPES[kind]


def check_rounding(name: str, values: Any, back: Any, folder: Path) -> float:
    """Largest difference. UserError where it is more than half a step of the block's scale."""
    off, blocks = np.abs(values - back), np.abs(values).reshape(-1, BLOCK).max(axis=1) / 127
    if (off.reshape(-1, BLOCK).max(axis=1) > blocks * HALF_STEP + 1e-7).any():
        raise UserError(f"{name} is farther from its quantized self than rounding goes", path=folder, key="--gguf-type")
    return float(off.max())


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{list(tensor.shape)} {xxhash.xxh3_128_hexdigest(content)}"


def check_written(path: Path, expected: dict[str, Any], tokenizer: Any, texts: list[str], folder: Path) -> None:
    """Read the file back through transformers. UserError for any weight or token that is not the folder's."""
    from finetune.models.gguf.conversion import read

    header = read_header(path)
    with task("reading the GGUF file back and comparing"):
        network, words = read(header)
        found = network.state_dict()
        read_as = getattr(torch, stored_dtype(header))
        for name, wanted in expected.items():
            ours = found[name].to(read_as)
            same = digest(ours) == wanted if isinstance(wanted, str) else close(ours, wanted.to(read_as), name, header)
            if not same:
                raise UserError(f"{name} does not come back from the GGUF file as it was", path=folder, key="--format")
        same_tokens(words, tokenizer, texts, folder)


def close(ours: torch.Tensor, wanted: torch.Tensor, name: str, header: Any) -> bool:
    if header.architecture == "gemma3" and name.endswith("norm.weight"):
        return bool(((ours.float() - wanted.float()).abs() <= NORM + wanted.float().abs() * 2**-8).all())
    return torch.equal(ours, wanted)


def same_tokens(words: Any, tokenizer: Any, texts: list[str], folder: Path) -> None:
    for text in texts:
        ours, theirs = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, words))
        if ours != theirs:
            raise UserError(f"the GGUF file's tokenizer gives other ids for {text!r}", path=folder, key="--format")
