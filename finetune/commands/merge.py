"""`ft merge`: one model out of base and adapter, proven to be their sum before it is called done.

The sum is formed and proven layer by layer in float32, whatever the precision of the weights; what is on disk is then
that sum rounded once, bit for bit. Rounding itself is reported, and never a reason to refuse.
"""

from __future__ import annotations

import gc
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune import places
from finetune.adapters.compatibility import check_merge
from finetune.adapters.merge import (
    adapted_layers,
    check_layers,
    check_written,
    in_float32,
    inputs_of,
    largest_difference,
    logits_of,
    merge_in_float32,
    prove_sums,
)
from finetune.data.chat import make_encoder
from finetune.early import DTYPES, REPORT, check_apart, check_target, written_names
from finetune.errors import UserError
from finetune.evaluation.generation import stop_ids
from finetune.families import family
from finetune.models import attach, hardware, loading, sources, tokenizers
from finetune.models.adapter_files import described
from finetune.models.chatglm.config import is_chatglm_layout
from finetune.models.chatglm.export import export_original
from finetune.models.config import read_config
from finetune.models.identity import configs_of
from finetune.models.weight_files import check_loading
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import read_recipe, versions
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import command, note, task, warn
from finetune.training import model_card

SAMPLES = (
    "Customer Alice from Beijing writes that order A1234 arrived broken on 3-14.",
    "订单B9876的电热水壶迟迟没有送到，客户王小明要求退款128元。",
    "def add(a, b):\n    return a + b\n\n# 1, 2, 3, 5, 8, 13",
    "Once upon a time there was a small model that wanted to be merged. 从前有一个小模型。",
)


def run(
    adapter: str,
    output: str,
    *,
    model: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    base: str = "original",
    layout: str = "hf",
) -> None:
    target = Path(output).expanduser()
    check_target(target, overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", key="--dtype", fix=f"one of {', '.join(DTYPES)}")
    folder = sources.adapter_folder(adapter)
    config, trained = configs_of(folder, model)
    check_apart(target, folder, sources.folder(config))
    if base not in ("original", "dequantized") or (base == "dequantized" and trained.quantization is None):
        fix = "one of original, dequantized" if trained.quantization else "it was trained on the original weights"
        raise UserError(f"no {base!r} base to merge into", path=folder, key="--base", fix=fix)
    started = ((read_recipe(folder.parent) or {}).get("adapter") or {}).get("init_lora_weights")
    if started == "loftq" and base == "original":
        raise UserError(
            "started by making up for what int4 rounds away (loftq), and the original weights are not rounded",
            path=folder, key="--base", fix="use --base dequantized",
        )  # fmt: skip
    values = read_config(config)
    check_layout(layout, values, config.name)
    check_merge(described(folder), values["model_type"], folder)
    if (fitted := attach.check_adapter(folder, config)) is not None:
        check_layers(fitted, folder)
    declared = values.get("dtype") or values.get("torch_dtype") or "float32"
    dtype = dtype or declared
    kind = getattr(torch, dtype)
    tokenizer = tokenizers.load_tokenizer(config, folder)
    encoder = make_encoder(tokenizer, family(values["model_type"]))
    samples = [encoder.prompt_ids([{"role": "user", "content": text}]) for text in SAMPLES]

    as_trained = None
    if trained.quantization is not None:
        quantized = loading.load_model(trained, kind, hardware.detect())
        as_trained = logits_of(attach.attach_adapter(quantized, folder, trained), samples)
        del quantized
    network = _base(config, trained, base, kind)
    attach.resize_for(network, folder, config)  # base and sum are compared, token by token
    before = logits_of(network, samples)
    exact = before if kind == torch.float32 else widened_logits(network, samples)
    adapted = attach.attach_adapter(network, folder, config)
    unmerged = logits_of(adapted, samples)
    method = adapted.peft_config["default"].peft_type.value
    stored = sources.stored_dtype(config) or declared
    if kind != torch.float32 and (base == "dequantized" or stored != dtype):
        # Its values do not fit into `kind`: sum in float32, so that they are rounded once.
        del network, adapted
        network = _base(config, trained, base, torch.float32)
        attach.resize_for(network, folder, config)
        exact = logits_of(network, samples)
        adapted = attach.attach_adapter(network, folder, config)
    calls = inputs_of(adapted, samples[0])
    with task("summing and proving", len(adapted_layers(adapted)), "layers") as advance:
        sums = prove_sums(adapted, calls, kind, advance)
        merged = merge_in_float32(adapted).to(kind)

    # A failed merge leaves nothing that looks like a model, and the one before stays until this one is proven.
    with places.built_beside(target, "--output", lambda: written_names(target, overwrite)) as part:
        stops, device = stop_ids(merged, encoder), merged.device
        with task("writing the merged model", after=1.0):
            if layout == "chatglm":
                export_original(merged, values, part, max_shard_size, source=sources.folder(config))
            else:
                merged.generation_config = GenerationConfig()  # checked while saving, and replaced below
                merged.save_pretrained(part, max_shard_size=max_shard_size)
                tokenizer.save_pretrained(part)
        write_generation_config(part, config, stops, tokenizer.pad_token_id)
        del network, adapted, merged
        gc.collect()
        with task("reading it back and comparing"):
            written = read_back(part, kind, config if layout == "chatglm" else None)
            check_written(sums, written)
            after = logits_of(written.to(device), samples)
        largest, relative = largest_difference(unmerged, after)
        figures = {
            "max_logit_diff": largest,
            "relative_diff": relative,
            "base_logit_diff": largest_difference(exact, before)[0] if exact is not None else math.nan,
            "adapter_effect": largest_difference(unmerged, before)[0],
            "compared_tokens": sum(len(ids) for ids in samples),
        }
        if as_trained is not None:
            figures["diff_to_trained_model"], _ = largest_difference(as_trained, after)
        report = {
            "base": config.name, "base_weights": base, "quantization": trained.quantization, "format": layout,
            "adapter": str(folder), "method": method, "dtype": dtype,
            "sum": {"layers": sums.layers, "largest_miss": sums.largest_miss, "tensors": len(sums.digests)},
            **{key: value if math.isfinite(value) else None for key, value in figures.items()},
        }  # fmt: skip
        with suppress(UserError):  # a hub's snapshot may be without it, and the hub away by now
            sources.file(config, "README.md")
        licence = model_card.licence_of(config.name, sources.folder(config))
        card = model_card.merged_card(report, config.name, licence, recipe_of(folder), target.name)
        write_atomically(part / "README.md", card)
        files = sorted({path.name for path in part.iterdir()} - {places.UNFINISHED} | {REPORT})
        write_json(part / REPORT, {**report, "versions": versions(), "files": files})
    note(f"merged {method} into {config.name} ({base} weights, {dtype}): {target}")
    if as_trained is not None:
        gap = figures["diff_to_trained_model"]
        note(f"difference to the {trained.quantization} model as trained: {gap:.3g} (measured, not a gate)")
    note(
        f"proven: in {sums.layers:,} layers the float32 sum misses at most {sums.largest_miss:.1g} of what the adapter "
        f"does, and all {len(sums.digests):,} tensors are on disk as that sum, rounded once to {dtype}"
    )
    if dtype != "float32" and largest > figures["adapter_effect"] / 2:
        warn(f"rounding to {dtype} moves logits about as much as the adapter does; --dtype float32 keeps all of it")
    alone = figures["base_logit_diff"]  # no number for a network whose layers cannot be computed in float32
    rounding = "" if dtype == "float32" or math.isnan(alone) else f" ({dtype} moves the base's own by {alone:.3g})"
    note(
        f"largest logit difference to the unmerged model {largest:.3g}{rounding}; the adapter itself moves logits by "
        f"up to {figures['adapter_effect']:.3g}"
    )
    shown = f"./{target}" if str(target).startswith("-") else str(target)
    lines = [("chat", "--model", shown)]
    recipe = read_recipe(folder.parent) or {}
    if (recipe.get("eval") or {}).get("data") or (recipe.get("data") or {}).get("eval_split"):
        lines.insert(0, ("eval", shown, "--compare-base"))
    for number, parts in enumerate(lines):
        note(f"{'' if number else 'next':7} {command(*parts)}")


def recipe_of(adapter: Path) -> dict[str, Any] | None:
    """The recipe of the run that an adapter lies in."""
    found = read_recipe(adapter.parent) if adapter.name == "adapter" else None
    return found if isinstance(found, dict) and {"stage", "model", "data", "output"} <= found.keys() else None


def check_layout(layout: str, values: dict[str, Any], name: str) -> None:
    """UserError for a layout that this base cannot be written in."""
    if layout not in ("hf", "chatglm"):
        raise UserError(f"unknown format {layout!r}", key="--format", fix="one of hf, chatglm")
    if layout == "chatglm" and not is_chatglm_layout(values):
        raise UserError(
            "is not in ChatGLM's original layout: there is no tokenizer.model and no code to put beside the weights",
            path=name, key="--format", fix="use --format hf, or give the original checkpoint with --model",
        )  # fmt: skip


def _base(config: ModelConfig, trained: ModelConfig, choice: str, dtype: torch.dtype) -> Any:
    """The weights to merge into, in `dtype`: the original ones, or what the quantized ones stand for."""
    if choice == "original":
        return loading.load_model(config, dtype, hardware.detect())
    return loading.load_model(trained, torch.float32, hardware.detect()).dequantize().to(dtype)


def widened_logits(network: Any, samples: list[list[int]]) -> list[torch.Tensor] | None:
    """Its logits computed in float32; None for a network that mixes precisions when its layers do not."""
    try:
        with in_float32(network):
            return logits_of(network, samples)
    except RuntimeError:
        return None


def read_back(folder: Path, dtype: torch.dtype, original: ModelConfig | None = None) -> Any:
    """What was written, loaded as anyone would (`original`: as that base, in ChatGLM's layout)."""
    if original is None:
        written, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        check_loading(info, str(folder))
        return written
    here = {"name": str(folder), "source": None, "revision": None, "sanity_check": False}
    return loading.load_model(original.model_copy(update=here), dtype)


def write_generation_config(folder: Path, base: ModelConfig, stops: list[int], pad: int | None) -> None:
    """What the base's file says, word for word, with what ends an answer and what pads it."""
    own = sources.file(base, "generation_config.json")
    said = json.loads(Path(own).read_text(encoding="utf-8")) if own is not None else {}
    write_json(folder / "generation_config.json", {**said, "eos_token_id": stops, "pad_token_id": pad})
