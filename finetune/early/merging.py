"""`ft merge` and `ft export`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from finetune import places
from finetune.adapters import consumers, weighted
from finetune.early.inputs import adapter_and_base, there, together
from finetune.errors import UserError
from finetune.models import pushing
from finetune.models.export import FORMATS
from finetune.models.gguf.places import check_type, check_unwritten
from finetune.models.pushing import Push
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import read_recipe, section_of

DTYPES = ("float32", "bfloat16", "float16")
BASES = ("original", "dequantized")
REPORT, EXPORT = "merge.json", "export.json"
SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB|TB)", re.IGNORECASE)


def merged(
    adapters: Sequence[str], target: Path, model: str | None, dtype: str | None, layout: str, overwrite: bool,
    size: str = "5GB", kind: str | None = None, density: float | None = None, seed: int | None = None,
    svd_rank: int | None = None, push: Push | None = None, base: str = "original",
) -> None:  # fmt: skip
    """UserError for what is wrong with the arguments of `ft merge`."""

    def these() -> None:
        parts = weighted.parts_of(adapters)
        if (how := weighted.combination(parts, kind, density, seed, svd_rank)) is not None:
            weighted.check(parts, how)
        for part in parts:
            check_apart(target, adapter_and_base(str(part.folder), model))

    together(
        lambda: check_target(target, overwrite), lambda: check_options(dtype, layout, base),
        lambda: check_size(size), these,
        *([] if push is None else [lambda: pushing.check(push)]),
    )  # fmt: skip


def exported(adapter: str, consumer: str, target: Path, model: str | None, overwrite: bool) -> None:
    """UserError for what is wrong with the arguments of `ft export`, and for limits that an adapter's config meets."""

    def these() -> None:
        folder = adapter_and_base(adapter, model)
        check_apart(target, folder, done="exported")
        consumers.check(consumer, places.read_json(folder / "adapter_config.json"), folder, started_by(folder))

    together(lambda: check_target(target, overwrite, EXPORT), lambda: consumers.consumer(consumer), these)


def started_by(adapter: Path) -> str | None:
    """init_lora_weights of the run that an adapter is of."""
    found = read_recipe(adapter.parent) if adapter.name == "adapter" else None
    return section_of(found, "adapter").get("init_lora_weights")


def gguf(adapter: str | None, model: str | None, target: Path, kind: str | None, overwrite: bool) -> None:
    """UserError for what is wrong with the arguments of `ft merge --format gguf`."""

    def base_there() -> None:
        if adapter is not None:
            adapter_and_base(adapter, model)
        else:
            there(ModelConfig(name=str(model)))

    together(lambda: check_unwritten(target, overwrite), lambda: check_type(kind), base_there)


def check_options(dtype: str | None, layout: str, base: str = "original") -> None:
    if base not in BASES:
        raise UserError(f"unknown weights {base!r}", key="--base", fix=f"one of {', '.join(BASES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}", key="--dtype", fix=f"one of {', '.join(DTYPES)}")
    if layout not in FORMATS:
        raise UserError(f"unknown format {layout!r}", key="--format", fix=f"one of {', '.join(FORMATS)}")


def check_size(text: str) -> None:
    """UserError for a size of shards that is none, or nothing."""
    if not SIZE.fullmatch(text.strip()) or not float(text.strip()[:-2]):
        raise UserError(f"{text!r} is no size", key="--max-shard-size", fix="write 5GB, 500MB")


def check_target(target: Path, overwrite: bool, report: str = REPORT) -> None:
    """UserError when something that no merge (or export) wrote stands at `target`, or one without `overwrite`."""
    places.check_folder(target, "--output", here=False)
    places.check_part(target, "--output")
    if not target.exists() or not any(target.iterdir()):
        return
    made = places.read_json(target / report)
    ours = "adapter" in made and places.made_by_ft(made)
    if not (ours and overwrite):
        fix = "choose another folder" + (", or --overwrite" if ours else "")
        raise UserError("already holds files", path=target, key="--output", fix=fix)


def written_names(target: Path, overwrite: bool, report: str = REPORT) -> Collection[str]:
    """What the merge, or the export, at `target` wrote."""
    check_target(target, overwrite, report)
    files = places.read_json(target / report).get("files")
    if isinstance(files, list):
        return files
    kinds = (".json", ".safetensors", ".jinja", ".model", ".txt", ".py")  # before it was noted
    return [path.name for path in target.iterdir() if path.suffix in kinds]


def check_apart(target: Path, *inputs: Path, done: str = "merged") -> None:
    """UserError when `target` is or holds something that is read."""
    full = target.resolve()
    for path in (path.resolve() for path in inputs):
        if full == path or full in path.parents:
            what = f"is what is {done}, or holds it ({path})"
            raise UserError(what, path=target, key="--output", fix="choose a folder of its own")
