"""Export formats of `ft merge`: how a merged model is written, and read back for the proof. No torch until then.

A format is a row of FORMATS; --format and the checks of its arguments come from the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families import family
from finetune.recipe.sections import ModelConfig


@dataclass(frozen=True)
class Format:
    write: Callable[[Any, Any, Path, Path, str], None]
    """Of (merged model, its tokenizer, folder of the base, folder to write into, size of a shard)."""
    load_for_proof: Callable[[Path, Any, ModelConfig], Any]
    """Of (that folder, torch dtype, base): the network, loaded as its users do. UserError for weights that did not
    arrive. Every tensor of it is then compared with the sum, bit by bit."""
    check: Callable[[ModelConfig, dict[str, Any]], None] = lambda model, config: None
    """Of (base, its config.json): UserError where the format cannot hold it."""
    stock: bool = True
    """Whether transformers alone loads it; the model's card says otherwise how."""


def write_hf(merged: Any, tokenizer: Any, base: Path, out: Path, max_shard_size: str) -> None:
    from transformers import GenerationConfig

    merged.generation_config = GenerationConfig()  # checked while saving, and replaced by whoever merges
    merged.save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)


def load_hf(folder: Path, dtype: Any, base: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    from finetune.models.weight_files import check_loading

    written, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    check_loading(info, str(folder))
    return written


def write_chatglm(merged: Any, tokenizer: Any, base: Path, out: Path, max_shard_size: str) -> None:
    from finetune.models.chatglm.config import read_config
    from finetune.models.chatglm.export import export_original

    export_original(merged, read_config(base), out, max_shard_size, source=base)


def load_in_layout(folder: Path, dtype: Any, base: ModelConfig) -> Any:
    """As the base itself is loaded."""
    from finetune.models.loading import load_model

    return load_model(base.at(str(folder), sanity_check=False), dtype)


def check_chatglm(model: ModelConfig, config: dict[str, Any]) -> None:
    if family(config["model_type"]).layout != "chatglm":
        raise UserError(
            "is not in ChatGLM's original layout: there is no tokenizer.model and no code to put beside the weights",
            path=model.name, key="--format", fix="use --format hf, or give the original checkpoint with --model",
        )  # fmt: skip


FORMATS = {
    "hf": Format(write_hf, load_hf),
    "chatglm": Format(write_chatglm, load_in_layout, check_chatglm, stock=False),
}
