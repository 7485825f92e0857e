"""An adapter's folder, made by any PEFT tool: what it says of itself, and whether it fits a base."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune import register
from finetune.errors import UserError
from finetune.models import weight_files
from finetune.models.weight_files import AGAIN, check_file, read_json

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head", "embed_out", "output_layer")
"""Last names of embeddings and output heads: modules with a row per token."""


def described(folder: Path) -> dict[str, Any]:
    """adapter_config.json. UserError unless peft knows such adapters and their weights are whole."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    register()
    path = folder / "adapter_config.json"
    found = read_json(path)
    kind = found.get("peft_type")
    known = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind not in known:
        what = "names no peft_type" if kind is None else f"unknown peft_type {kind!r}"
        fix = f"copy the file again; this peft knows {', '.join(sorted(known))}"
        raise UserError(what, path=path, key="peft_type", fix=fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # keys of later versions: peft says so again when it loads the adapter
            known[kind].from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"is no config of {kind} that peft can read ({reason})", path=path, fix=AGAIN) from None
    check_file(weights(folder))
    return found


def weights(folder: Path) -> Path:
    """adapter_model.safetensors, or .bin as peft wrote it until 2023."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError("holds no adapter_model.safetensors (or .bin)", path=folder, fix=AGAIN)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return weight_files.shapes(weights(folder))


def scale_of(stored: dict[str, Any], layer: str) -> float:
    """What B A of a LoRA layer is multiplied by, as peft finds it: by the first key of a pattern that ends its name."""
    from peft.utils.other import get_pattern_key

    def said(pattern: str, otherwise: str) -> float:
        table = stored.get(pattern) or {}
        return float(table.get(get_pattern_key(table.keys(), layer), stored[otherwise]))

    rank = said("rank_pattern", "r")
    return said("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if stored.get("use_rslora") else rank)


def save_adapter(config: Any, weights: dict[str, torch.Tensor], out: Path) -> None:
    """config: peft's."""
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(out))
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})


def is_embedding(name: str) -> bool:
    return any(part in EMBEDDINGS for part in name.split("."))


def own_embeddings(folder: Path) -> dict[str, int]:
    """Name -> rows of the embeddings and heads that the adapter's file holds whole."""
    return {
        name: shape[0]
        for name, shape in shapes(folder).items()
        if len(shape) == 2 and name.endswith(".weight") and is_embedding(name) and "lora_" not in name
    }


def resize(model: Any, folder: Path, tokens: int = 0) -> None:
    """Give the base as many embeddings as the adapter was trained on: those its file holds, or its tokenizer's tokens.

    New rows are the mean of the old ones, which the adapter's own replace.

    Args:
        tokens: of the adapter's tokenizer, when that has more than the base's.
    """
    have = model.get_input_embeddings().weight.shape[0]
    wanted = max(own_embeddings(folder).values(), default=max(have, tokens))
    if wanted == have:
        return
    model.resize_token_embeddings(wanted, mean_resizing=False)
    if wanted > have:
        with torch.no_grad():
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                if module is not None and not module.weight.is_meta:
                    module.weight[have:] = module.weight[:have].mean(dim=0)


def check_fit(model: Any, folder: Path, name: str) -> Any:
    """The adapter on a network without weights, or None where peft cannot do that.

    UserError when it names modules that are not there, or its file lacks weights or holds ones of other shapes.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    register()
    config = PeftConfig.from_pretrained(str(folder))
    stored = shapes(folder)
    fix = "give the base it was trained on"
    if config.is_prompt_learning:
        _check_prompt(model, config, stored, folder, name)
        return None
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # some starts are computed from weights
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, re.error) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"does not fit {name} ({reason})", path=folder, key="model.name", fix=fix) from None
    except RuntimeError:  # some methods compute their start from weights, which are not there yet
        return None
    base = {PREFIX + n for n, _ in model.named_parameters()}
    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(n for n in stored.keys() - wanted.keys() if n not in base and not is_embedding(n))
    other = sorted(n for n in wanted.keys() & stored.keys() if tuple(wanted[n].shape) != stored[n])
    if str(config.peft_type.value) == "ADALORA":  # has cut its ranks since
        other = []
    for kind, names in (("lacks weights for", missing), ("has more weights than", extra)):
        if names:
            shown = f"{len(names)}, e.g. {names[0]}"
            raise UserError(f"{kind} {name} ({shown})", path=folder, key="model.name", fix=fix)
    if other:
        first = other[0]
        what = f"{first} is {list(stored[first])}, {name} wants {list(wanted[first].shape)}"
        raise UserError(what, path=folder, key="model.name", fix=fix)
    return adapted


def _check_prompt(model: Any, config: Any, stored: dict[str, tuple[int, ...]], folder: Path, name: str) -> None:
    shape = stored.get("prompt_embeddings")
    if shape is None:
        raise UserError("holds no prompt_embeddings", path=weights(folder), fix=AGAIN)
    network = model.config.get_text_config()
    width = network.hidden_size
    if str(config.peft_type.value) == "PREFIX_TUNING":
        heads = getattr(network, "num_key_value_heads", None) or network.num_attention_heads
        size = getattr(network, "head_dim", None) or network.hidden_size // network.num_attention_heads
        width = 2 * network.num_hidden_layers * heads * size
    if len(shape) == 2 and shape[1] != width:
        raise UserError(
            f"its virtual tokens are {shape[1]} wide, {name} wants {width}", path=folder, key="model.name",
            fix="give the base it was trained on",
        )  # fmt: skip
