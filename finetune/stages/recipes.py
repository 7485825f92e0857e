"""`ft recipes`: what is shipped, a start for one's own, and the schema for editors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from finetune import recipe_reference
from finetune.errors import UserError
from finetune.places import check_file, json_with
from finetune.progress import command, say, say_json
from finetune.recipe import RECIPES
from finetune.recipe_file import find, schema, shipped
from finetune.run import write_atomically

TEMPLATE = """\
# ft {stage} --recipe {path}
# $schema: {schema}
version: 1
stage: {stage}
model: {{name: {model}}}
data: {{train: {data}, eval_split: 0.05, max_length: 2048}}
{adapter}train: {{learning_rate: 2.0e-4, num_train_epochs: 3, effective_batch_size: 16}}
output: {{dir: runs/{name}}}
"""
SCHEMA_FILE = "ft-recipe.schema.json"


def show_all() -> None:
    """Every shipped recipe with what it needs: those for built-in bases first, then those that download theirs."""
    groups: dict[str, list[str]] = {"": []}
    for name, path in shipped().items():
        text = path.read_text(encoding="utf-8")
        run_with, _, needs = text.splitlines()[0].lstrip("# ").partition("  ")
        model = str(yaml.safe_load(text)["model"]["name"])
        download = "" if "/" not in model else f"these download {model} first"
        groups.setdefault(download, []).append(f"{name:30} {needs.strip() or run_with}")
    for download, lines in groups.items():
        say(f"\n{download}:" if download else "on built-in bases, without a download:")
        say("\n".join(lines))
    say("\nft recipes show NAME prints one; --set model.name=tiny-llama runs any of them on a built-in base")


def show(name: str) -> None:
    say(find(name).read_text(encoding="utf-8"), end="")


def explain(key: str | None, markdown: bool) -> None:
    """A key or a section in words; all of them without a name."""
    if markdown:
        say(recipe_reference.document(), end="")
    else:
        say("\n".join(recipe_reference.explain(key)))


def show_schema() -> None:
    say_json(schema())


def new(path: str, stage: str, model: str, data: str) -> None:
    """Write a recipe and the schema beside it; an existing file is never replaced."""
    target = Path(path)
    if os.path.lexists(target):
        raise UserError("exists already", path=target, fix="choose another name")
    if stage not in RECIPES:
        raise UserError(f"unknown stage {stage!r}", key="--stage", fix=f"one of {', '.join(RECIPES)}")
    beside = target.parent / SCHEMA_FILE
    check_file(target, "PATH", lambda _: False)
    check_file(beside, "PATH", json_with("$schema", "$defs"))
    adapter = "adapter: {method: lora, r: 16, lora_alpha: 32}\n" if stage != "pretrain" else ""
    text = TEMPLATE.format(
        stage=stage, path=path, model=model, data=data, adapter=adapter, name=target.stem, schema=SCHEMA_FILE
    )
    write_atomically(target, text)
    write_atomically(beside, json.dumps(schema(), ensure_ascii=False, indent=2))
    say(f"wrote {target} and {beside}; now run {command(stage, '--recipe', target, '--dry-run')}")
