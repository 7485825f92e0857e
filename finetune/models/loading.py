"""Load models: built-in bases, local folders, hub and ModelScope ids through one door.

Remote code is never run, pickles are read with weights_only. Where files lie: sources.py.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import enable_fsdp_ram_efficient_loading
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.errors import UserError
from finetune.models import native, quantization, sanity, sources
from finetune.models.config import read_config
from finetune.models.failures import as_user_error
from finetune.models.layouts import layout_of
from finetune.models.tokenizers import load_tokenizer
from finetune.models.weight_files import check_file, weight_files
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import shown_name, task

CPU = Hardware()


def load_model(model: ModelConfig, dtype: torch.dtype, machine: Hardware = CPU, **options: Any) -> PreTrainedModel:
    """The base model in `dtype` on this machine's device (or as `model.device_map` spreads it), in eval mode.

    UserError on missing, unexpected or misshapen weights, and when the result does not know a word (`sanity_check`).
    """
    config = read_config(model)
    quantization.check_config(model, config)
    check_weights(model)
    if model.quantization is not None:
        quantization.check_network(skeleton(model), model)
    offloaded = contextlib.ExitStack()
    if model.device_map is not None:
        scratch = offloaded.enter_context(tempfile.TemporaryDirectory(prefix="ft-offload-", ignore_cleanup_errors=True))
        options |= _spread(model, scratch)
    elif machine.device != "cpu" and "distributed_config" not in options:  # that says where each part goes
        options.setdefault("device_map", {"": torch.accelerator.current_device_index()})
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if (quantized := quantization.config_for(model, dtype)) is not None:
        options["quantization_config"] = quantized
    precision = [str(dtype).removeprefix("torch."), *([model.quantization] if model.quantization else [])]
    with offloaded, task(f"loading {shown_name(model.name)} ({', '.join(precision)})"):
        layout = layout_of(config)
        with as_user_error(model):
            loaded: Any = layout.weights(model, layout.network(model, config), dtype=dtype, **options)
        weakref.finalize(loaded, offloaded.pop_all().close)
        if quantized is not None or quantization.is_bitsandbytes(config):
            quantization.after_loading(loaded, model.name)
    in_one_piece(loaded)
    if model.sanity_check is not False:
        plain = model.model_copy(update={"chat_template": None})  # its text is no conversation
        with task("looking whether it is a language model", after=1.0):
            sanity.check(loaded, load_tokenizer(plain), model)
    return loaded


def without_weights(model: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The network as `load_model` gives it, for a process that gets its weights from the first one: they are memory
    that nobody has touched, of which nothing is resident. Nothing is read but config.json.

    transformers 5.23 leaves missing weights where they are in such a process, and computes the buffers that no
    checkpoint has; that it reads none of those that are there is done here.
    """
    config = read_config(model)
    options = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    network = layout_of(config).network(model, config)
    before = {name: os.environ.get(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")}
    enable_fsdp_ram_efficient_loading()
    try:
        with as_user_error(model):
            kind: Any = type(of_config(network, model))
            loaded = kind.from_pretrained(None, config=network, state_dict={}, dtype=dtype, **options)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    untouched: dict[int, torch.nn.Parameter] = {}
    for module in loaded.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                made = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = untouched.setdefault(id(parameter), made)
    native.named_as_it_is(loaded)
    in_one_piece(loaded)
    return loaded.eval()


def in_one_piece(model: Any) -> None:
    """The head takes its input in one piece.

    transformers cuts the last positions out of all rows. Of such a slice times a frozen matrix torch 2.13 makes a
    product per row, and in bfloat16 on CPUs copies the matrix for each: 16 rows times [1024, 60000] take 18 s and
    2 GB, where 0.04 s and 2 MB do.
    """
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        head.register_forward_pre_hook(_contiguous)


def _contiguous(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(states.contiguous() for states in inputs)


def check_weights(model: ModelConfig) -> None:
    """UserError for weight files of a local folder that are missing or cut off; only headers are read."""
    where = Path(sources.locate(model))
    if model.source != "modelscope" and where.is_dir():
        for file in weight_files(where):
            check_file(file)


def skeleton(model: ModelConfig, with_weights: bool = True) -> PreTrainedModel:
    """The network without weights (on torch's meta device): names and shapes, before anything large is read.

    with_weights: whether there must be weights, to be loaded later.
    """
    config = read_config(model)
    network = layout_of(config).network(model, config)
    if with_weights:
        check_weights(model)
    return of_config(network, model)


def of_config(network: Any, model: ModelConfig) -> PreTrainedModel:
    """The same, of transformers' config."""
    with as_user_error(model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(network)


def _spread(model: ModelConfig, scratch: str) -> dict[str, Any]:
    """What accelerate needs to spread a model over devices, main memory and disk."""
    options: dict[str, Any] = {"device_map": model.device_map, "offload_folder": model.offload_folder or scratch}
    if model.max_memory:
        options["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in model.max_memory.items()}
    return options


def refuse_training(model: PreTrainedModel, name: str) -> None:
    """UserError when weights lie where no gradient reaches: on disk, or in main memory beside a GPU."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    away = places & ({"disk"} if places <= {"cpu", "disk"} else {"cpu", "disk"})
    if away:
        raise UserError(
            f"weights are on {' and '.join(sorted(away))}, where they can generate but not be trained", path=name,
            key="model.device_map", fix="use model.quantization: int4, a smaller base, or more memory",
        )  # fmt: skip


def new_model(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights from a transformers config; the caller has set the seed. Under torch's meta device
    without them."""
    try:
        built = AutoConfig.for_model(**{"model_type": None, **config})
        return AutoModelForCausalLM.from_config(built, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no model can be built from it ({reason})", key="model.config", fix="see the config class"
        ) from None
