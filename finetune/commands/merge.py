"""`ft merge`: one model out of base and adapter, proven to be their sum before it is called done.

The sum is formed and proven layer by layer in float32, whatever the precision of the weights; what is on disk is then
that sum rounded once, bit for bit. Rounding itself is reported, and never a reason to refuse.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import places
from finetune.adapters import combine, merge, weighted
from finetune.adapters.compatibility import check_merge
from finetune.adapters.merge import Sums, largest_difference, logits_of
from finetune.adapters.weighted import Combination, Part
from finetune.base import Base
from finetune.data import thinking
from finetune.early.merging import REPORT, check_apart, check_options, check_size, check_target, written_names
from finetune.errors import UserError
from finetune.evaluation.generation import stop_ids
from finetune.models import attach, hardware, loading, pushing, sources
from finetune.models.adapter_files import described
from finetune.models.export import FORMATS
from finetune.models.identity import configs_of
from finetune.models.pushing import Push
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import read_recipe, versions
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import advise, command, note, task, warn
from finetune.training import model_card

SAMPLES = (
    "Customer Alice from Beijing writes that order A1234 arrived broken on 3-14.",
    "订单B9876的电热水壶迟迟没有送到，客户王小明要求退款128元。",
    "def add(a, b):\n    return a + b\n\n# 1, 2, 3, 5, 8, 13",
    "Once upon a time there was a small model that wanted to be merged. 从前有一个小模型。",
)


@dataclass(frozen=True)
class Job:
    """What is merged, and into what."""

    base: Base
    """In its original precision, with the adapter's tokenizer."""
    trained: ModelConfig
    """The same, quantized as it was in training."""
    adapter: Path
    """What is added to the base: the adapter, or the combination of several."""
    parts: list[Part]
    """Those that were given."""
    how: Combination | None
    outcome: combine.Outcome | None
    """Of the combination."""
    method: str
    """Its peft type."""
    weights: str
    """original, or dequantized: what the quantized weights stand for."""
    dtype: str
    kind: torch.dtype
    layout: str
    """Row of FORMATS."""
    generation: dict[str, Any]
    """The base's generation_config.json."""
    samples: list[list[int]]


def run(
    adapter: str | Sequence[str], output: str, *, model: str | None = None, dtype: str | None = None,
    max_shard_size: str = "5GB", overwrite: bool = False, base: str = "original", layout: str = "hf",
    kind: str | None = None, density: float | None = None, seed: int | None = None, svd_rank: int | None = None,
    push: Push | None = None,
) -> None:  # fmt: skip
    """Args: adapter: PLACE[:WEIGHT], or several; kind, density, seed, svd_rank: of `weighted.combination`."""
    target = Path(output).expanduser()
    check_target(target, overwrite)
    check_options(dtype, layout)
    check_size(max_shard_size)
    parts = weighted.parts_of([adapter] if isinstance(adapter, str) else adapter)
    how = weighted.combination(parts, kind, density, seed, svd_rank)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = opened(parts, how, target, model, dtype, base, layout, scratch)
        merged, sums, logits = summed(job)
        # A failed merge leaves nothing that looks like a model, and the one before stays until this one is proven.
        part = stack.enter_context(places.built_beside(target, "--output", lambda: written_names(target, overwrite)))
        device = merged.device
        write(job, merged, part, max_shard_size)
        del merged
        gc.collect()
        with task("reading it back and comparing"):
            written = FORMATS[layout].load_for_proof(part, job.kind, job.base.model)
            merge.check_written(sums, written)
            logits["merged"] = logits_of(written.to(device), job.samples)
        figures = measured(logits)
        write_report(job, sums, figures, part, target.name)
    tell(job, sums, figures, target)
    if push is not None:
        # What else lies there is the user's, and merge.json has this machine's paths.
        files = set(places.read_json(target / REPORT)["files"]) - {REPORT}
        note(f"pushed: {pushing.push(target, sorted(files), push)}")


def opened(
    parts: list[Part], how: Combination | None, target: Path, model: str | None, dtype: str | None, weights: str,
    layout: str, scratch: Path,
) -> Job:  # fmt: skip
    """Base and adapter. UserError, before any weights are loaded, for what cannot be merged.

    Args:
        scratch: folder for a combination of several.
    """
    folder = parts[0].folder
    config, trained = configs_of(folder, model)
    for part in parts:
        check_apart(target, part.folder, sources.folder(config))
        check_base_weights(part.folder, configs_of(part.folder, model)[1], weights)
    base = Base.open(config, folder)
    FORMATS[layout].check(config, base.config)
    stored = described(folder)
    outcome = None
    if how is not None:
        weighted.check(parts, how)
        kinds = {configs_of(part.folder, model)[1].quantization for part in parts}
        if len(kinds) > 1 and weights == "dequantized":
            what = f"the adapters were trained on weights of several kinds ({', '.join(map(str, kinds))})"
            raise UserError(what, key="--base", fix="merge into the original weights")
        trained = trained if len(kinds) == 1 else config
        outcome = combine.combine(parts, how, config, scratch)
        note(outcome.said())
        folder = scratch
    check_merge(stored, base.config["model_type"], folder)
    if (fitted := attach.check_adapter(folder, config)) is not None:
        merge.check_layers(fitted, folder)
    samples = [base.encoder.prompt_ids([{"role": "user", "content": text}]) for text in SAMPLES]
    dtype = dtype or declared(base)
    own = sources.file(config, "generation_config.json")
    generation = {} if own is None else read_json(Path(own))
    return Job(
        base, trained, folder, parts, how, outcome, stored["peft_type"], weights, dtype, getattr(torch, dtype), layout,
        generation, samples,
    )  # fmt: skip


def check_base_weights(folder: Path, trained: ModelConfig, weights: str) -> None:
    """UserError for a --base that is none of this adapter's."""
    if weights not in ("original", "dequantized") or (weights == "dequantized" and trained.quantization is None):
        fix = "one of original, dequantized" if trained.quantization else "it was trained on the original weights"
        raise UserError(f"no {weights!r} base to merge into", path=folder, key="--base", fix=fix)
    started = ((read_recipe(folder.parent) or {}).get("adapter") or {}).get("init_lora_weights")
    if started == "loftq" and weights == "original":
        raise UserError(
            "started by making up for what int4 rounds away (loftq), and the original weights are not rounded",
            path=folder, key="--base", fix="use --base dequantized",
        )  # fmt: skip


def declared(base: Base) -> str:
    """The dtype that config.json names."""
    return str(base.config.get("dtype") or base.config.get("torch_dtype") or "float32")


def summed(job: Job) -> tuple[Any, Sums, dict[str, Any]]:
    """The merged model, what each of its tensors must be on disk, and logits of the samples to compare it with: of the
    quantized model as `trained`, of the `base` and of the same in float32 (`exact`, or None), of base + adapter
    (`unmerged`)."""
    logits: dict[str, Any] = {}
    if job.trained.quantization is not None:
        quantized = loading.load_model(job.trained, job.kind, hardware.detect())
        logits["trained"] = logits_of(with_adapter(quantized, job), job.samples)
        del quantized
    network = start(job, job.kind)
    logits["base"] = logits_of(network, job.samples)
    logits["exact"] = logits["base"] if job.kind == torch.float32 else widened_logits(network, job.samples)
    adapted = with_adapter(network, job)
    logits["unmerged"] = logits_of(adapted, job.samples)
    stored = sources.stored_dtype(job.base.model) or declared(job.base)
    if job.kind != torch.float32 and (job.weights == "dequantized" or stored != job.dtype):
        # Its values do not fit into `kind`: sum in float32, so that they are rounded once.
        del network, adapted
        network = start(job, torch.float32)
        logits["exact"] = logits_of(network, job.samples)
        adapted = with_adapter(network, job)
    calls = merge.inputs_of(adapted, job.samples[0])
    with task("summing and proving", len(merge.adapted_layers(adapted)), "layers") as advance:
        sums = merge.prove_sums(adapted, calls, job.kind, advance)
        return merge.merge_in_float32(adapted).to(job.kind), sums, logits


def start(job: Job, dtype: torch.dtype) -> Any:
    """The weights to merge into, with as many embeddings as the adapter has: both are compared, token by token."""
    model, machine = job.base.model, hardware.detect()
    if job.weights == "original":
        network = loading.load_model(model, dtype, machine)
    else:
        network = loading.load_model(job.trained, torch.float32, machine).dequantize().to(dtype)
    attach.resize_for(network, job.adapter, model)
    return network


def with_adapter(network: Any, job: Job) -> Any:
    return attach.attach_adapter(network, job.adapter, job.base.model)


def widened_logits(network: Any, samples: list[list[int]]) -> list[torch.Tensor] | None:
    """Its logits computed in float32; None for a network that mixes precisions when its layers do not."""
    try:
        with merge.in_float32(network):
            return logits_of(network, samples)
    except RuntimeError:
        return None


def write(job: Job, merged: Any, out: Path, max_shard_size: str) -> None:
    """In the job's format, with the base's generation_config.json word for word, but for what ends an answer and what
    pads it."""
    base, stops = job.base, stop_ids(merged, job.base.encoder)
    with task("writing the merged model", after=1.0):
        FORMATS[job.layout].write(merged, base.tokenizer, base.folder, out, max_shard_size)
    ends = {"eos_token_id": stops, "pad_token_id": base.tokenizer.pad_token_id}
    write_json(out / "generation_config.json", {**job.generation, **ends})


def measured(logits: dict[str, Any]) -> dict[str, float]:
    """Largest differences of logits over all samples."""
    unmerged, merged, base, exact = (logits[name] for name in ("unmerged", "merged", "base", "exact"))
    largest, relative = largest_difference(unmerged, merged)
    figures = {
        "max_logit_diff": largest,
        "relative_diff": relative,
        # No number for a network whose layers cannot be computed in float32.
        "base_logit_diff": largest_difference(exact, base)[0] if exact is not None else math.nan,
        "adapter_effect": largest_difference(unmerged, base)[0],
        "compared_tokens": sum(len(rows) for rows in unmerged),
    }
    if "trained" in logits:
        figures["diff_to_trained_model"], _ = largest_difference(logits["trained"], merged)
    return figures


def write_report(job: Job, sums: Sums, figures: dict[str, float], out: Path, title: str) -> None:
    """merge.json and the model's card."""
    base = job.base
    report = {
        "base": base.model.name, "base_weights": job.weights, "quantization": job.trained.quantization,
        "format": job.layout, "adapter": str(job.parts[0].folder), "method": job.method, "dtype": job.dtype,
        "adapters": [{"adapter": str(part.folder), "weight": part.weight} for part in job.parts],
        **combined(job),
        "sum": {"layers": sums.layers, "largest_miss": sums.largest_miss, "tensors": len(sums.digests)},
        **{key: value if math.isfinite(value) else None for key, value in figures.items()},
    }  # fmt: skip
    with suppress(UserError):  # a hub's snapshot may be without it, and the hub away by now
        sources.file(base.model, "README.md")
    licence = model_card.licence_of(base.model.name, base.folder)
    runs = [model_card.trained_by(part.folder) for part in job.parts]
    card = model_card.merged_card(report, base.model.name, licence, runs, title)
    write_atomically(out / "README.md", card)
    if base.trained:
        write_json(out / thinking.FILE, base.trained)
    files = sorted({path.name for path in out.iterdir()} - {places.UNFINISHED} | {REPORT})
    write_json(out / REPORT, {**report, "versions": versions(), "files": files})


def combined(job: Job) -> dict[str, Any]:
    """For merge.json: how several adapters, or one with a weight, became one."""
    if job.how is None or job.outcome is None:
        return {}
    settings = {"density": job.how.density, "seed": job.how.seed, "svd_rank": job.outcome.rank}
    if job.how.kind != "svd":
        del settings["svd_rank"]
    return {"combine": job.how.kind, **settings, "difference_to_weighted_sum": job.outcome.difference}


def tell(job: Job, sums: Sums, figures: dict[str, float], target: Path) -> None:
    """What was done and proven, and what to type next."""
    count = f"{len(job.parts)} adapters of type " if len(job.parts) > 1 else ""
    note(f"merged {count}{job.method} into {job.base.model.name} ({job.weights} weights, {job.dtype}): {target}")
    if "diff_to_trained_model" in figures:
        gap = figures["diff_to_trained_model"]
        note(f"difference to the {job.trained.quantization} model as trained: {gap:.3g} (measured, not a gate)")
    note(
        f"proven: in {sums.layers:,} layers the float32 sum misses at most {sums.largest_miss:.1g} of what the adapter "
        f"does, and all {len(sums.digests):,} tensors are on disk as that sum, rounded once to {job.dtype}"
    )
    largest, effect, alone = (figures[key] for key in ("max_logit_diff", "adapter_effect", "base_logit_diff"))
    if job.dtype != "float32" and largest > effect / 2:
        warn(f"rounding to {job.dtype} moves logits about as much as the adapter does; --dtype float32 keeps all of it")
    known = job.dtype != "float32" and not math.isnan(alone)
    rounding = f" ({job.dtype} moves the base's own by {alone:.3g})" if known else ""
    note(
        f"largest logit difference to the unmerged model {largest:.3g}{rounding}; the adapter itself moves logits by "
        f"up to {effect:.3g}"
    )
    trained, marks = job.base.trained, job.base.encoder.thinking
    if said := thinking.mismatch(trained, None, marks):
        how = f"{marks.switch}: {str(thinking.usual(trained)).lower()}"
        warn(f"by the chat template's default {said}: ask the merged model with {how}")
    shown = f"./{target}" if str(target).startswith("-") else str(target)
    lines = [("chat", "--model", shown)]
    recipe = read_recipe(job.parts[0].folder.parent) or {}
    if (recipe.get("eval") or {}).get("data") or (recipe.get("data") or {}).get("eval_split"):
        lines.insert(0, ("eval", shown, "--compare-base"))
    for number, parts in enumerate(lines):
        advise(f"{'' if number else 'next':7} {command(*parts)}")
