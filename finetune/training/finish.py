"""What a run leaves: weights, model card, report, result.json; and what to type next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune import places
from finetune.adapters.load import save as save_adapter
from finetune.base import Base
from finetune.data import thinking
from finetune.errors import UserError
from finetune.families import family
from finetune.models import sources
from finetune.models.hardware import described, peak_memory_gb
from finetune.models.identity import write_identity
from finetune.models.quantization import parameter_counts
from finetune.planning.memory import Estimate
from finetune.recipe.file import to_yaml
from finetune.recipe.stages import Recipe
from finetune.report import page, picture
from finetune.run.directory import Run, versions
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import advise, command, duration, note, shown_path
from finetune.training import memory, model_card
from finetune.training.weight_check import check_finite


def save(recipe: Recipe, run: Run, model: Any, base: Base, template: str | None) -> Path:
    """adapter/ in PEFT's format, or model/ after full fine-tuning, with tokenizer, template and the base's identity.

    base: what the adapter sits on.
    """
    if template is not None:
        base.tokenizer.chat_template = template
    full = recipe.adapter.method == "full"
    if full:
        model.to(getattr(torch, recipe.model.dtype))
        check_finite(model.named_parameters(), f"in {recipe.model.dtype}")
    target = run.model if full else run.adapter
    with whole(target) as folder:
        model.save_pretrained(folder) if full else save_adapter(model, folder)
        base.tokenizer.save_pretrained(folder)
        if not full:
            write_identity(folder, base.model, base.fingerprint, template)
    return target


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder that takes the name `target` when everything is in it. What else lies there, of the user's, stays."""
    part = places.part_of(target)
    with places.built_beside(target, "output.dir", lambda: {path.name for path in part.iterdir()}):
        yield part


def finish(
    recipe: Recipe, run: Run, model: Any, outcome: dict[str, Any], counts: dict[str, Any], notes: list[str], base: Base,
    planned: Estimate | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The model card, loss.png, report.html and, last, result.json.

    outcome: what the trainer says, of `fit`; base: as for `save`; planned: what `ft plan` says that a pass takes.
    """
    trainable, total = parameter_counts(model)
    thought = recorded(recipe, run, counts, base)
    result = {
        "stage": recipe.stage, "status": "done", "eval": {}, **outcome,
        "trainable_parameters": trainable, "total_parameters": total,
        "trained_tokens": counts["trained_tokens"], "dropped_rows": counts["dropped"], "data": counts,
        "peak_memory_gb": round(peak_memory_gb(), 3), "decisions": notes, "machine": described(),
        **({} if planned is None else {"plan": memory.record(planned)}),
        **({} if thought is None else {"thinking": thought}),
    }  # fmt: skip
    write_card(recipe, run, result, base)
    picture.write(run, result)
    page.write(run.path, {**result, "versions": versions()})
    run.finish(result)
    return result


def recorded(recipe: Recipe, run: Run, counts: dict[str, Any], base: Base) -> dict[str, Any] | None:
    """What was trained of thinking, also beside the weights; None where the chat format knows of none."""
    if recipe.stage == "pretrain" or not (base.encoder.thinking.known or counts.get("thinking")):
        return None
    found = thinking.record(base.encoder, counts)
    if recipe.stage == "ppo":
        on = thinking.of_prompts(recipe, base.encoder)
        on = thinking.usual(base.trained) if on is None else on
        found |= {"shown": ["off", "on"] if on is None else [thinking.named(on)]}
    write_json((run.model if recipe.adapter.method == "full" else run.adapter) / thinking.FILE, found)
    return found


def write_card(recipe: Recipe, run: Run, result: dict[str, Any], base: Base) -> None:
    """README.md beside the weights, in the place of peft's empty form; all of it as the umask has it."""
    full = recipe.adapter.method == "full"
    weights = run.model if full else run.adapter
    config = places.read_json(weights / "config.json") if full else base.config
    name = licence = place = None
    if not recipe.model.is_new:
        name, folder = recipe.model.name, sources.folder(recipe.model)
        with suppress(UserError):  # a hub's snapshot may be without it, and the hub away by now
            sources.file(recipe.model, "README.md")
        licence = model_card.licence_of(name, folder)
        place = model_card.place_of(name, folder) if base.model.name == name else os.path.relpath(base.folder, weights)
    values = yaml.safe_load(to_yaml(recipe))
    row = family(config["model_type"])
    original = row.name if row.layout else None
    gguf = not recipe.model.is_new and sources.is_gguf_base(recipe.model)
    text = model_card.card(values, result, name, licence, place=place, original_layout=original, gguf=gguf)
    write_atomically(weights / "README.md", text)
    places.as_umask(weights)


@dataclass(frozen=True)
class Words:
    """What the summary of a stage says."""

    gist: Callable[[dict[str, Any]], str | None] = lambda held_out: None
    """The figure of its evaluation that says most; None for the losses."""
    answers: bool = True
    """Whether the result writes answers."""
    hint: str | None = None
    """What else can be done with it; {run} is its directory."""


def summary(recipe: Recipe, run: Run, weights: Path, result: dict[str, Any], words: Words) -> None:
    """What was done, where it is, and what to type next."""
    share = result["trainable_parameters"] / result["total_parameters"]
    held_out = f", held-out loss {result['eval']['loss']:.4f}" if "loss" in result["eval"] else ""
    gist = words.gist(result["eval"]) or f"training loss {result['train_loss']:.4f}{held_out}"
    note(f"done in {duration(result['seconds'])}: {result['steps']:,} steps, {gist}")
    note(f"trained {result['trainable_parameters']:,} of {result['total_parameters']:,} parameters ({share:.2%})")
    note(f"weights {shown_path(weights)}   report {shown_path(run.path / 'report.html')}")
    for number, line in enumerate(next_commands(recipe, shown_path(run.path), words.answers)):
        advise(f"{'' if number else 'next':7} {command(*line)}")
    if recipe.eval.data is None and recipe.data.eval_split is None:
        advise("no rows were held out: for figures give ft eval a file with --data, or set data.eval_split")
    if words.hint is not None:
        advise(words.hint.format(run=shown_path(run.path)))


def next_commands(recipe: Recipe, name: str, answers: bool) -> list[list[str]]:
    """What can be done with a run, as it stands: each of these can be typed."""
    found = []
    if recipe.eval.data is not None or recipe.data.eval_split is not None:
        found.append(["eval", name, *(["--compare-base"] if answers and not recipe.model.is_new else [])])
    if answers:
        found.append(["chat", "--model" if recipe.adapter.method == "full" else "--adapter", name])
    return found
