"""A GGUF file becomes a model folder, through transformers' `gguf_file`, with what it leaves out.

Precision: a file of floats keeps its own. Quantized weights are computed in float32 and stored as bfloat16, which is
half the disk and memory, and changes little beside the quantization: for SmolLM2-135M Q4_1 the answers' distribution
moves by a mean KL of 7e-05 nats from that of the exact weights; llama.cpp's own rounding of activations moves it by
3e-03, computing in bfloat16 by 1e-03.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GgufConfig
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from finetune.errors import UserError
from finetune.models.failures import as_user_error
from finetune.models.gguf.checks import stored_dtype
from finetune.models.gguf.config import USED, correct
from finetune.models.gguf.header import KEY, Header
from finetune.models.gguf.tokenizer import ends_of, rebuild
from finetune.models.weight_files import check_loading
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import shown_name, task

SHARD = "4GB"


def convert(header: Header, out: Path) -> None:
    """Write the folder. UserError when a weight of the file or of the network stays without its counterpart."""
    path = str(header.path)
    with (
        as_user_error(ModelConfig(name=path)),
        task(f"converting {shown_name(path)} to a model folder (once; {header.parameters / 1e6:,.0f}M parameters)"),
    ):
        model, tokenizer = read(header)
        model.save_pretrained(out, max_shard_size=SHARD)
    tokenizer.save_pretrained(out)
    ends = ends_of(tokenizer, header)
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends or None).save_pretrained(out)
    note_licence(header, out)


def read(header: Header) -> tuple[Any, Any]:
    """(network, tokenizer)"""
    with tempfile.TemporaryDirectory() as scratch:
        # Ollama's files have no suffix; and transformers reads a file of that name in the working directory first.
        name = f"{uuid.uuid4().hex}.gguf"
        (Path(scratch) / name).symlink_to(header.path.resolve())
        where: dict[str, Any] = {"pretrained_model_name_or_path": scratch, "gguf_file": name}
        config = AutoConfig.from_pretrained(**where)
        correct(config, header)
        tokenizer = rebuild(where, header)
        return network(where, config, header), tokenizer


def config_of(header: Header) -> Any:
    """transformers' config of what is in a file; its weights are not read."""
    with tempfile.TemporaryDirectory() as scratch, as_user_error(ModelConfig(name=str(header.path))):
        (Path(scratch) / "model.gguf").symlink_to(header.path.resolve())
        config = AutoConfig.from_pretrained(scratch, gguf_file="model.gguf")
        correct(config, header)
        return config


def network(where: dict[str, Any], config: Any, header: Header) -> Any:
    dtype = getattr(torch, stored_dtype(header))
    plain = GgufConfig(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        **where, config=config, dtype=dtype, quantization_config=plain, output_loading_info=True
    )
    check_loading(info, str(header.path))
    unread = (
        set() if header.architecture in GGUF_CONFIG_ARCHS else set(header.tensors) - known_tensors(model, header) - USED
    )
    if unread:
        shown = ", ".join(sorted(unread)[:3])
        what = f"{len(unread)} weights have no place in transformers' {config.model_type} ({shown})"
        raise UserError(what, path=header.path, key=KEY, fix="use the model's folder of safetensors")
    # transformers saves no model that says it is quantized; these weights no longer are.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    return model


def known_tensors(model: Any, header: Header) -> set[str]:
    """Names in the file that become weights of the network."""
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    return set(get_gguf_hf_weights_map(model, processor))


def note_licence(header: Header, out: Path) -> None:
    """As the head of a model card, where whoever writes cards looks for it."""
    if isinstance(named := header.values.get("general.license"), str):
        (out / "README.md").write_text(f"---\nlicense: {json.dumps(named)}\n---\n", encoding="utf-8")
