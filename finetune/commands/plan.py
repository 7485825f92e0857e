"""`ft plan`: what a recipe needs before it is run. Nothing is loaded: the network is built from its config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune.adapters import compatibility
from finetune.errors import FinetuneError, UserError
from finetune.language import translated
from finetune.models import hardware, sources
from finetune.planning import cards, fits, sizing, speed
from finetune.planning.memory import Estimate, estimate
from finetune.planning.network import Network, build
from finetune.planning.source import skeleton
from finetune.recipe.resolve import Hardware, a_step, batch_layout, resolve
from finetune.recipe.stages import Recipe
from finetune.run.writing import write_json
from finetune.terminal.progress import note, output, say, say_json, task, tell
from finetune.training.amount import Amount, amount, read

GB = 1e9
NAMES = {
    "weights": "weights of the base", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer",
    "activations": "activations", "logits": "logits and loss", "kv_cache": "KV cache",
    "ppo": "PPO's other adapters, with theirs", "framework": "framework", "fragmentation": "fragmentation",
}  # fmt: skip


def run(raw: Recipe, gpu: str | None = None, json_file: str | None = None) -> None:
    machine, card = machine_of(gpu)
    if (notice := start_missing(raw)) is not None:
        note(notice)
    with task("building the network without its weights", after=1.0):
        network = skeleton(raw.model)
        raw = sizing.continued(raw)  # type: ignore[type-var]
        recipe, built, sized = planned(raw, network, machine)
    with task("counting the rows", after=1.0):
        data = counted(recipe, sized)
    if recipe.data.packing:
        recipe = packed(recipe, *(data.cut or batch_layout(recipe.train, recipe.data.max_length, sized)))
    rows, length = recipe.train.per_device_train_batch_size or 1, fits.length_of(recipe)
    with task("going through a step", after=1.0):
        found = attempt(
            recipe, lambda: estimate(built, recipe, rows, length, machine.device, fits.accumulation(recipe))
        )
    with task("looking what else fits", after=1.0):
        work = speed.work(built, recipe, found, data.steps, data.rows, data.tokens)
        tflops = card.tflops if card is not None else speed.measured_tflops(getattr(torch, recipe.model.dtype))
        more = room(recipe, network, built, found, machine)
    report = as_json(recipe, built, found, work, tflops, machine, more)
    if json_file == "-":
        say_json(report)
        return
    show(recipe, built, found, work, tflops, machine, card, more)
    if json_file is not None:
        write_json(Path(json_file), report)


def start_missing(recipe: Recipe) -> str | None:
    """A note where the adapter that training goes on from is not there yet."""
    named = recipe.model.adapter
    if named is None or sources.find_adapter(named) is not None:
        return None
    return f"{named} is not there yet: planned as adapter.method: {recipe.adapter.method}, as the recipe says"


def machine_of(gpu: str | None) -> tuple[Hardware, cards.Card | None]:
    if gpu is None:
        return hardware.detect(), None
    card = cards.card(gpu)
    return Hardware("cuda", card.bf16, card.memory), card


def planned(raw: Recipe, network: Any, machine: Hardware) -> tuple[Recipe, Network, Hardware]:
    """The complete recipe for that machine, its network, and the machine with the rows that fit it."""
    recipe = resolve(raw, machine)
    compatibility.check(recipe)  # what training refuses has no plan
    built = attempt(recipe, lambda: build(recipe, network))
    if raw.train.per_device_train_batch_size or raw.train.gradient_accumulation_steps:
        return recipe, built, machine
    sized = replace(machine, rows=attempt(recipe, lambda: sizing.rows_of(built, recipe, machine)))
    return resolve(raw, sized), built, sized


def packed(recipe: Recipe, rows: int, passes: int) -> Recipe:
    """With the rows of a step as they are once they are packed."""
    step = {"effective_batch_size": rows * passes, "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": None}  # fmt: skip
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=step)})


def counted(recipe: Recipe, machine: Hardware) -> Amount:
    """What the data says, or a note why it says nothing: the run may be planned for another machine."""
    try:
        data = read(recipe)
    except FinetuneError as error:
        note(f"the steps cannot be counted here: {error.lines()[0]}")
        data = None
    return amount(recipe, data, machine)


def attempt(recipe: Recipe, work: Any) -> Any:
    """UserError, by the architecture's name, where its network does something that cannot be followed."""
    try:
        return work()
    except FinetuneError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise UserError(
            f"its network computes in a way that cannot be planned without weights ({reason})", path=recipe.model.name,
            key="model.name", fix="try a few rows of it: train.max_steps 1",
        ) from error  # fmt: skip


def room(recipe: Recipe, network: Any, built: Network, now: Estimate, machine: Hardware) -> dict[str, Any]:
    """What else fits, and what would make it fit."""
    step, _ = a_step(recipe)
    fit = now.peak <= fits.budget(machine)
    rows = fits.rows_that_fit(built, recipe, now.length, machine, max(step.effective_batch_size, 64), now.rows)
    found: dict[str, Any] = {"fits": fit, "largest_batch": rows, "changes": []}
    longest = built.model.config.get_text_config()
    cap = int(getattr(longest, "max_position_embeddings", None) or 131_072)
    found["longest_rows"] = fits.length_that_fits(built, recipe, now, machine, cap)
    found["positions"] = cap
    if not fit:
        found["changes"] = [
            {"set": change.settings, "slowdown": round(change.slowdown, 3), "why": change.why,
             "peak_memory_gb": round(change.peak / GB, 3)}
            for change in fits.changes(recipe, network, now, machine, built=built)
        ]  # fmt: skip
    return found


def as_json(
    recipe: Recipe, built: Network, found: Estimate, work: speed.Work, tflops: float | None, machine: Hardware,
    more: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    timed = speed.seconds(work.flops, tflops) if work.flops is not None and tflops else None
    return {
        "peak_memory_gb": round(found.peak / GB, 4),
        "memory": {part: round(size / GB, 4) for part, size in found.parts.items()},
        "when": found.when, "memory_gb": round(machine.memory_gb, 2), "device": machine.device,
        "total_parameters": built.total, "active_parameters": built.active, "trainable_parameters": built.trainable,
        "flops": work.flops, "step_flops": work.step_flops, "pass_flops": found.flops, "steps": work.steps,
        "seconds": timed and round(timed[1], 1), "seconds_range": timed and [round(timed[0], 1), round(timed[2], 1)],
        "tflops": tflops and round(tflops, 3),
        "per_device_train_batch_size": found.rows, "gradient_accumulation_steps": fits.accumulation(recipe),
        "max_length": found.length, "tokens_per_row": work.tokens and round(work.tokens, 1),
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "dtype": recipe.model.dtype, "quantization": recipe.model.quantization,
        "kv_cache_gb": round(found.kv_cache / GB, 4), **more,
    }  # fmt: skip


def show(
    recipe: Recipe, built: Network, found: Estimate, work: speed.Work, tflops: float | None, machine: Hardware,
    card: cards.Card | None, more: dict[str, Any],
) -> None:  # fmt: skip
    share = built.trainable / built.total
    active = "" if built.active == built.total else f", {built.active / 1e9:.3g} billion of them for each token"
    tell(f"{recipe.model.name}: {built.total:,} parameters{active}; {built.trainable:,} are trained ({share:.3%})")
    table = Table(box=None, pad_edge=False)
    table.add_column(translated("memory"))
    table.add_column("GB", justify="right")
    for part, size in found.parts.items():
        if size:
            table.add_row(translated(NAMES[part]), f"{size / GB:,.3f}")
    table.add_row(translated("peak"), f"{found.peak / GB:,.3f}")
    output.print(table)
    where = card.name if card is not None else f"this machine ({machine.device})"
    accumulated = fits.accumulation(recipe)
    passes = "a pass" if accumulated == 1 else f"{accumulated} passes"
    tell(f"at its peak in {translated(found.when)}; {found.rows} x {found.length:,} tokens a pass, {passes} a step")
    planned_with = f"{fits.budget(machine) / GB:,.3g} of {machine.memory_gb:,.3g} GB can be planned with"
    tell(f"{'fits' if more['fits'] else 'does not fit'} {where}: {planned_with}")
    rows, longest = more["largest_batch"], more["longest_rows"]
    most = f"{rows} rows of {found.length:,} tokens in a pass" if rows else f"not one row of {found.length:,} tokens"
    tell(f"most that fits: {most}{f', or {found.rows} of {longest:,} tokens' if longest else ''}")
    if longest + fits.STEP > more["positions"]:
        positions = more["positions"]
        tell(f"longer rows have no positions: max_position_embeddings is {positions:,} (model.rope_scaling gives more)")
    for change in more["changes"]:
        keys = " ".join(f"--set {key}={str(value).lower() if isinstance(value, bool) else value}"
                        for key, value in change["set"].items())  # fmt: skip
        slower = translated(f"{change['slowdown']:.2f} x the time")
        say(f"  {keys}: {change['peak_memory_gb']:,.2f} GB, {slower} ({translated(change['why'])})")
    if not more["fits"] and not more["changes"]:
        tell("nothing that can be changed in the recipe makes it fit: a smaller base, or a larger card")
    timing(recipe, work, tflops)
    if tflops is None:
        note("how fast a card of that size is, its size does not say: --gpu 'RTX 4090' plans the time, too")


def timing(recipe: Recipe, work: speed.Work, tflops: float | None) -> None:
    step = f"{work.step_flops / 1e12:,.3g} TFLOP a {'rollout' if recipe.stage == 'ppo' else 'step'}"
    if work.flops is None:
        tell(f"{step}; how many, the data says, which is not here")
        return
    kind = (
        f"{work.tokens:,.0f} tokens a row" if work.tokens else f"at most: every row {recipe.data.max_length:,} tokens"
    )
    digits = 0 if work.flops >= 1e14 else 2
    line = f"{step}, {work.flops / 1e12:,.{digits}f} in {work.steps:,} ({kind})"
    if tflops:
        fast, _, slow = speed.seconds(work.flops, tflops)
        line += f": {lasting(fast)} to {lasting(slow)} at 70 to 30% of {tflops:,.3g} TFLOP/s"
    tell(line)


def lasting(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
