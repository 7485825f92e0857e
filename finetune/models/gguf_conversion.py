"""A GGUF file becomes a model folder, through transformers' `gguf_file`, with what it leaves out.

Precision: a file of floats keeps its own. Quantized weights are computed in float32 and stored as bfloat16.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from finetune.errors import UserError
from finetune.models.failures import as_user_error
from finetune.models.gguf import DIGIT_SPLITS, KEY, NOTES, Header, stored_dtype
from finetune.models.weight_files import check_loading
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import shown_name, task

SHARD = "4GB"


def convert(path: Path, header: Header, out: Path) -> None:
    """Write the folder. UserError when a weight of the file or of the network stays without its counterpart."""
    name = shown_name(str(path))
    with (
        tempfile.TemporaryDirectory() as scratch,
        as_user_error(ModelConfig(name=str(path))),
        task(f"converting {name} to a model folder (once; {header.parameters / 1e6:,.0f}M parameters)"),
    ):
        (Path(scratch) / "model.gguf").symlink_to(path.resolve())  # Ollama's files have no suffix
        where: dict[str, Any] = {"pretrained_model_name_or_path": scratch, "gguf_file": "model.gguf"}
        config = AutoConfig.from_pretrained(**where)
        correct(config, header, path)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        network(where, config, header, path).save_pretrained(out, max_shard_size=SHARD)
    split_digits(tokenizer, header)
    tokenizer.save_pretrained(out)
    ends = ends_of(tokenizer, header)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None).save_pretrained(out)
    note_licence(header, out)
    sizes = {file.name: file.stat().st_size for file in out.iterdir() if file.suffix}
    (out / NOTES).write_text(json.dumps({"from": path.name, "files": sizes}, indent=1) + "\n", encoding="utf-8")


def network(where: dict[str, Any], config: Any, header: Header, path: Path) -> Any:
    dtype = getattr(torch, stored_dtype(header))
    plain = GgufConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, config=config, dtype=dtype, quantization_config=plain, output_loading_info=True
    )
    check_loading(info, str(path))
    unread = set(header.tensors) - known_tensors(model, header) - {"rope_freqs.weight"}
    if unread:
        shown = ", ".join(sorted(unread)[:3])
        what = f"{len(unread)} weights have no place in transformers' {config.model_type} ({shown})"
        raise UserError(what, path=path, key=KEY, fix="use the model's folder of safetensors")
    # transformers saves no model that says it is quantized; these weights no longer are.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    return model


def known_tensors(model: Any, header: Header) -> set[str]:
    """Names in the file that become weights of the network."""
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    return set(get_gguf_hf_weights_map(model, processor))


def correct(config: Any, header: Header, path: Path) -> None:
    """What transformers leaves at its class's default although the file says it."""
    for key in ("_model_name_or_path", "unk_token_id"):
        config.__dict__.pop(key, None)
    rows = header.tensors.get("token_embd.weight", ((0, 0), 0))[0]
    if len(rows) == 2:
        config.vocab_size = rows[1]
    width = header.get("attention.key_length")
    if width is not None and getattr(config, "head_dim", None) is not None:
        config.head_dim = width
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, key, float(str(np.float32(value))))  # 1e-06, not its neighbour in 64 bits


def split_digits(tokenizer: Any, header: Header) -> None:
    """The pre-tokenizer of StarCoder and SmolLM, which transformers does not know: every digit alone, then GPT-2's."""
    if header.values.get("tokenizer.ggml.pre") in DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])


def ends_of(tokenizer: Any, header: Header) -> list[int]:
    """Ids that end an answer: of the text, and of the turn where the file names it apart."""
    named = [tokenizer.eos_token_id, *(header.values.get(f"tokenizer.ggml.{k}_token_id") for k in ("eot", "eom"))]
    return list(dict.fromkeys(found for found in named if found is not None))


def note_licence(header: Header, out: Path) -> None:
    """As the head of a model card, where whoever writes cards looks for it."""
    if isinstance(named := header.values.get("general.license"), str):
        (out / "README.md").write_text(f"---\nlicense: {json.dumps(named)}\n---\n", encoding="utf-8")
