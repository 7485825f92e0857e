"""`ft merge`: one model out of base and adapter, compared with the two before it is called done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from finetune.adapters.build import adapter_config
from finetune.adapters.limits import check_merge
from finetune.adapters.merge import check_layers, largest_difference, logits_of, merge_in_float32
from finetune.data.chat import make_encoder
from finetune.errors import RunError, UserError
from finetune.evaluation import stop_ids
from finetune.families import family
from finetune.models import hardware, loading
from finetune.models.chatglm_config import is_chatglm_layout
from finetune.models.chatglm_export import export_original
from finetune.progress import note
from finetune.recipe import ModelConfig
from finetune.run import read_recipe, versions, write_json

# Largest difference of a logit, relative to the largest logit, that rounding the merged weights once can explain.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

SAMPLES = (
    "Customer Alice from Beijing writes that order A1234 arrived broken on 3-14.",
    "订单B9876的电热水壶迟迟没有送到，客户王小明要求退款128元。",
    "def add(a, b):\n    return a + b\n\n# 1, 2, 3, 5, 8, 13",
    "Once upon a time there was a small model that wanted to be merged. 从前有一个小模型。",
)


def run(
    adapter: str,
    output: str,
    model: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    base: str = "original",
    layout: str = "hf",
) -> None:
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise UserError("already holds files", path=target, key="--output", fix="choose another folder, or --overwrite")
    if dtype is not None and dtype not in TOLERANCE:
        raise UserError(f"unknown dtype {dtype!r}", key="--dtype", fix=f"one of {', '.join(TOLERANCE)}")
    folder = loading.adapter_folder(adapter)
    config, trained = loading.configs_of(folder, model)
    if base not in ("original", "dequantized") or (base == "dequantized" and trained.quantization is None):
        fix = "one of original, dequantized" if trained.quantization else "it was trained on the original weights"
        raise UserError(f"no {base!r} base to merge into", path=folder, key="--base", fix=fix)
    started = ((read_recipe(folder.parent) or {}).get("adapter") or {}).get("init_lora_weights")
    if started == "loftq" and base == "original":
        raise UserError(
            "started by making up for what int4 rounds away (loftq), and the original weights are not rounded",
            path=folder, key="--base", fix="use --base dequantized",
        )  # fmt: skip
    values = loading.read_config(config)
    check_layout(layout, values, config.name)
    check_merge(adapter_config(folder), values["model_type"], folder)
    if (fitted := loading.check_adapter(folder, config)) is not None:
        check_layers(fitted, folder)
    dtype = dtype or values.get("dtype") or values.get("torch_dtype") or "float32"
    kind = getattr(torch, dtype)
    tokenizer = loading.load_tokenizer(config, folder)
    encoder = make_encoder(tokenizer, family(values["model_type"]))
    samples = [encoder.prompt_ids([{"role": "user", "content": text}]) for text in SAMPLES]

    as_trained = None
    if trained.quantization is not None:
        quantized = loading.load_model(trained, kind, hardware.detect())
        as_trained = logits_of(loading.attach_adapter(quantized, folder, trained), samples)
        del quantized
    network = _base(config, trained, base, kind)
    loading.resize_for(network, folder, config)  # base and sum are compared, token by token
    before = logits_of(network, samples)
    adapted = loading.attach_adapter(network, folder, config)
    unmerged = logits_of(adapted, samples)
    method = adapted.peft_config["default"].peft_type.value
    if base == "dequantized":  # its exact values are float32: sum there, round once
        del network, adapted
        adapted = loading.attach_adapter(_base(config, trained, base, torch.float32), folder, config)
    merged = merge_in_float32(adapted).to(kind)

    # Written beside the target and renamed when proven: a failed merge leaves nothing that looks like a model.
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        merged.generation_config.eos_token_id = stop_ids(merged, encoder)
        merged.generation_config.pad_token_id = tokenizer.pad_token_id
        if layout == "chatglm":
            export_original(merged, values, part, max_shard_size, source=loading.folder(config))
        else:
            merged.save_pretrained(part, max_shard_size=max_shard_size)
            tokenizer.save_pretrained(part)
        report = prove(part, samples, before, unmerged, dtype, config if layout == "chatglm" else None)
        if as_trained is not None:
            report["diff_to_trained_model"], _ = largest_difference(as_trained, logits_of(merged, samples))
        origin = {"base": config.name, "base_weights": base, "quantization": trained.quantization}
        report = {**origin, "format": layout, "adapter": str(folder), "method": method, "dtype": dtype, **report}
        write_json(part / "merge.json", {**report, "versions": versions()})
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    note(f"merged {method} into {config.name} ({base} weights, {dtype}): {target}")
    if as_trained is not None:
        gap = report["diff_to_trained_model"]
        note(f"difference to the {trained.quantization} model as trained: {gap:.3g} (measured, not a gate)")
    note(
        f"largest logit difference to the unmerged model {report['max_logit_diff']:.3g} "
        f"({report['relative_diff']:.2%} of the largest logit, tolerance {report['tolerance']:.2%}); "
        f"the adapter itself moves logits by up to {report['adapter_effect']:.3g}"
    )


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


def prove(
    folder: Path,
    samples: list[list[int]],
    before: list[torch.Tensor],
    unmerged: list[torch.Tensor],
    dtype: str,
    original: ModelConfig | None = None,
) -> dict[str, Any]:
    """Load what was written as anyone would (`original`: as that base, in ChatGLM's layout), and compare its logits
    with base + adapter. RunError over tolerance."""
    if original is None:
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    else:
        here = {"name": str(folder), "source": None, "revision": None, "sanity_check": False}
        written = loading.load_model(original.model_copy(update=here), getattr(torch, dtype))
    difference, relative = largest_difference(unmerged, logits_of(written, samples))
    effect, _ = largest_difference(unmerged, before)
    tokens = sum(len(ids) for ids in samples)
    if not relative <= TOLERANCE[dtype]:
        raise RunError(
            f"the merged model differs from base + adapter: logits by up to {difference:.3g} ({relative:.2%} of the "
            f"largest, tolerance {TOLERANCE[dtype]:.2%}); nothing was written; try --dtype float32"
        )
    return {
        "max_logit_diff": difference,
        "relative_diff": relative,
        "tolerance": TOLERANCE[dtype],
        "adapter_effect": effect,
        "compared_tokens": tokens,
    }
