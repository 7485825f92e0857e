"""INT8 and INT4 bases with bitsandbytes, on GPUs and CPUs.

INT8 is LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), INT4 is NF4 or FP4 with double quantization (Dettmers et al.
2023, arXiv:2305.14314). Embeddings, norms, the LM head and score heads keep their precision. Experts: experts.py.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from finetune import ranks
from finetune.errors import UserError
from finetune.recipe.sections import ModelConfig

MOST_UNQUANTIZED = 0.2  # share of the block weights that may stay unquantized
HEADS = ["lm_head", "score", "embed_out", "output_layer", "output_projection"]
# Layers whose weights transformers reads past the layer: Mamba's mixers, Gemma 3n's AltUp.
READ_DIRECTLY = [
    "x_proj", "dt_proj", "mixer.out_proj", "mamba.out_proj", "correction_coefs", "prediction_coefs",
]  # fmt: skip
# quant_method of a checkpoint -> the package that reads it
LIBRARIES = {
    "bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel", "hqq": "hqq", "aqlm": "aqlm",
    "compressed-tensors": "compressed_tensors", "torchao": "torchao", "quanto": "optimum.quanto",
}  # fmt: skip


def config_for(model: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings for `model.quantization`; None without."""
    if model.quantization is None:
        return None
    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEADS + READ_DIRECTLY)
    from finetune.models.experts import METHOD

    found = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards floating-point numbers only: the packed bytes pass for some.
        **({"bnb_4bit_quant_storage": dtype} if ranks.sharded() else {}),
        llm_int8_skip_modules=HEADS + READ_DIRECTLY,  # its name notwithstanding, 4-bit loading reads it, too
    )
    found.quant_method = METHOD
    return found


def check_config(model: ModelConfig, config: dict[str, Any]) -> None:
    """UserError for what cannot be quantized, before anything is loaded."""
    stored = config.get("quantization_config") or {}
    if not isinstance(stored, dict):
        raise UserError("quantization_config of config.json is no mapping", path=model.name, fix="download it again")
    method = stored.get("quant_method")
    if method is not None and model.quantization is not None:
        raise UserError(
            f"is already quantized ({method})", path=model.name, key="model.quantization",
            fix="leave model.quantization out",
        )  # fmt: skip
    package = LIBRARIES.get(method or "", "")
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"is quantized with {method} and needs a library for it", path=model.name, key="model.name",
            fix=f"pip install {package}",
        )  # fmt: skip


def check_network(network: torch.nn.Module, model: ModelConfig) -> None:
    """UserError for a network, without weights yet, much of which would stay as large as it is."""
    if model.quantization is None:
        return
    experts = [m for m in network.modules() if any(p.ndim == 3 for p in m.parameters(recurse=False))]
    packed = sum(shape.numel() for m in experts for shape in experts_of(m).values())
    if packed and model.quantization == "int8":
        raise UserError(
            "mixture-of-experts models keep their experts as 3-D parameters in transformers 5, for which bitsandbytes "
            "has no int8", path=model.name, key="model.quantization", fix="use int4",
        )  # fmt: skip
    rest = matrices(network) - packed - sum(m.weight.numel() for m in linear_layers(network))
    share = rest / max(1, matrices(network))
    if share > MOST_UNQUANTIZED:
        own: Counter[str] = Counter()
        for m in experts:
            own[type(m).__name__] += 0 if experts_of(m) else sum(p.numel() for p in m.parameters(recurse=False))
        kinds = [kind for kind, size in own.items() if size > rest / 2]
        where = f" ({', '.join(kinds)} keeps them in 3-D parameters and computes in its own way)" if kinds else ""
        raise UserError(
            f"{share:.0%} of the block weights would be left unquantized{where}", path=model.name,
            key="model.quantization", fix="leave it out, or use a model of another architecture",
        )  # fmt: skip


def experts_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of the weights of experts that can be held in 4 bits, if `module` holds some."""
    from finetune.models.experts import expert_weights

    return expert_weights(module)


def linear_layers(network: torch.nn.Module) -> list[Any]:
    """Those that transformers replaces by quantized ones."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HEADS + READ_DIRECTLY
    found = ((name, m) for name, m in network.named_modules() if type(m) in (torch.nn.Linear, Conv1D))
    return [module for name, module in found if should_convert_module(name, kept)]


def is_held_quantized(model: ModelConfig, config: dict[str, Any]) -> bool:
    """Whether linear layers will be integers: by the recipe, or as the checkpoint is stored."""
    return model.quantization is not None or bool(config.get("quantization_config"))


def is_bitsandbytes(config: dict[str, Any]) -> bool:
    """Whether config.json says that the checkpoint is stored in bitsandbytes' own format."""
    return (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def is_quantized(module: torch.nn.Module) -> bool:
    import bitsandbytes as bnb

    from finetune.models.experts import Experts4bit

    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt | Experts4bit)


def quantized_weights(module: Any) -> dict[str, tuple[torch.nn.Parameter, list[int]]]:
    """Name -> (weight, the shape that it stands for) of what a quantized module holds packed."""
    shapes = getattr(module, "shapes", None) or {"weight": (module.out_features, module.in_features)}
    return {name: (getattr(module, name), [*shape]) for name, shape in shapes.items()}


def for_experts(config: Any, model: Any) -> Any:
    """The same config of peft, which then also fits experts in 4 bits, if `model` has some."""
    if getattr(model, "is_loaded_in_4bit", False) and str(config.peft_type.value) == "LORA":
        from finetune.models import experts_lora

        experts_lora.register(config)
    return config


def after_loading(model: Any, name: str) -> None:
    """Make a quantized model trainable on CPUs. UserError for misshapen weights, or if much of it was not quantized."""
    import bitsandbytes as bnb

    check_shapes(model, name)
    head = model.get_output_embeddings()
    if head is not None and is_quantized(head):
        raise UserError(
            "its output head has a name of its own and would be held as integers", path=name,
            key="model.quantization", fix="leave it out: this kind of model is not quantized here",
        )  # fmt: skip
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an evaluation forward repacks the weights for a kernel without autograd, for
            # good: from then on most gradients are exactly zero, without an error.
            module.support_avx512bf16_for_cpu = False
    size = measure(model)
    if size.unquantized_share > MOST_UNQUANTIZED:
        raise UserError(
            f"{size.unquantized_share:.0%} of the block weights were left unquantized", path=name,
            key="model.quantization", fix="this architecture is not supported by bitsandbytes: leave it out",
        )  # fmt: skip


def check_shapes(model: Any, name: str) -> None:
    """UserError for misshapen weights: transformers does not compare those that it quantizes while loading."""
    for path, module in model.named_modules():
        for key, (weight, meant) in quantized_weights(module).items() if is_quantized(module) else ():
            state = getattr(weight, "quant_state", None)
            stored = list(weight.shape if state is None else state.shape)
            if stored != meant:
                raise UserError(
                    f"misshapen weights ({path}.{key}: {stored}, config.json means {meant})", path=name,
                    fix="config.json belongs to another checkpoint",
                )  # fmt: skip


@dataclass(frozen=True)
class Size:
    quantized_parameters: int
    block_parameters: int
    """Matrices outside of embeddings and output head."""
    quantized_bytes: int
    """With their scales."""

    @property
    def unquantized_share(self) -> float:
        return 1 - self.quantized_parameters / max(1, self.block_parameters)


def measure(model: Any) -> Size:
    """What was really quantized."""
    quantized = quantized_bytes = 0
    inside: set[int] = set()
    for module in model.modules():
        for weight, _ in quantized_weights(module).values() if is_quantized(module) else ():
            inside.add(id(weight))
            quantized += real_numel(weight)
            quantized_bytes += storage_bytes(weight)
    return Size(quantized, quantized + matrices(model, inside), quantized_bytes)


def matrices(model: Any, without: Iterable[int] = ()) -> int:
    """Number of weights in matrices outside of embeddings and output head.

    Args:
        without: ids of parameters that do not count.
    """
    left_out = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    left_out |= {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    left_out |= {*without}
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in left_out)


def real_numel(parameter: torch.nn.Parameter) -> int:
    """Number of weights that a parameter stands for: twice the numel() of a 4-bit one."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def storage_bytes(parameter: torch.nn.Parameter) -> int:
    """Bytes of a parameter with its scales."""
    size = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        size += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    scales = getattr(parameter, "SCB", None)
    return size + (scales.numel() * scales.element_size() if scales is not None else 0)


def planned_bytes(network: torch.nn.Module, kind: str | None, dtype: torch.dtype) -> int:
    """What `weight_bytes` will be with model.quantization: `kind`, from a network without weights."""
    linear = linear_layers(network) if kind else []
    packed = [m.weight for m in linear]
    if kind == "int4":
        packed += [getattr(m, name) for m in network.modules() for name in experts_of(m)]
    inside = {id(weight) for weight in packed}
    size = sum(p.numel() * dtype.itemsize for p in network.parameters() if id(p) not in inside)
    if kind == "int8":
        return size + sum(m.weight.numel() + 4 * int(getattr(m, "nf", 0) or m.out_features) for m in linear)
    return size + sum(packed_bytes(weight.numel()) for weight in packed)


def packed_bytes(weights: int) -> int:
    """Of a parameter in 4 bits: a byte for two weights and for the scale of 64, a float for 256 scales, tables."""
    scales = -(-weights // 64)
    return weights // 2 + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


def weight_bytes(model: Any) -> int:
    """Bytes of all weights; a tied matrix counts once."""
    return sum(storage_bytes(p) for p in model.parameters())


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a tied matrix counts once. Of weights in parts what was `counted` before."""
    if (counted := getattr(model, "counted", None)) is not None:
        return counted
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(real_numel(p) for p in model.parameters())
