"""`ft recipes`: what is shipped, a start for one's own, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from finetune import recipe_reference
from finetune.errors import UserError
from finetune.recipe import RECIPES
from finetune.recipe_file import find, schema, shipped

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
        command, _, needs = text.splitlines()[0].lstrip("# ").partition("  ")
        model = str(yaml.safe_load(text)["model"]["name"])
        download = "" if "/" not in model else f"these download {model} first"
        groups.setdefault(download, []).append(f"{name:30} {needs.strip() or command}")
    for download, lines in groups.items():
        print(f"\n{download}:" if download else "on built-in bases, without a download:")
        print("\n".join(lines))
    print("\nft recipes show NAME prints one; --set model.name=tiny-llama runs any of them on a built-in base")


def show(name: str) -> None:
    print(find(name).read_text(encoding="utf-8"), end="")


def explain(key: str | None, markdown: bool) -> None:
    """A key or a section in words; all of them without a name."""
    if markdown:
        print(recipe_reference.document(), end="")
    else:
        print("\n".join(recipe_reference.explain(key)))


def show_schema() -> None:
    print(json.dumps(schema(), ensure_ascii=False, indent=2))


def new(path: str, stage: str, model: str, data: str) -> None:
    """Write a recipe and the schema beside it; an existing file is never replaced."""
    target = Path(path)
    if target.exists():
        raise UserError("exists already", path=target, fix="choose another name")
    if stage not in RECIPES:
        raise UserError(f"unknown stage {stage!r}", key="--stage", fix=f"one of {', '.join(RECIPES)}")
    if not target.parent.is_dir():
        raise UserError("no such folder", path=target.parent, fix="make it first")
    adapter = "adapter: {method: lora, r: 16, lora_alpha: 32}\n" if stage != "pretrain" else ""
    text = TEMPLATE.format(
        stage=stage, path=path, model=model, data=data, adapter=adapter, name=target.stem, schema=SCHEMA_FILE
    )
    target.write_text(text, encoding="utf-8")
    (target.parent / SCHEMA_FILE).write_text(json.dumps(schema(), ensure_ascii=False, indent=2), encoding="utf-8")
    print(f"wrote {target} and {target.parent / SCHEMA_FILE}; now run ft {stage} --recipe {target} --dry-run")
