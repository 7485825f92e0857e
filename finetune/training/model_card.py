"""README.md beside weights: a model card in the hub's format, with nothing left to fill in."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune import places
from finetune.adapters.methods import of
from finetune.models.export import FORMATS
from finetune.recipe.sections import held_sets
from finetune.resources import BUILTIN_MODELS
from finetune.run.directory import read_recipe
from finetune.terminal.progress import command, shown_name
from finetune.terminal.values import shown, with_intervals

Trained = tuple[dict[str, Any], dict[str, Any] | None] | None
"""The resolved recipe of a run, and its result.json."""


def licence_of(base: str, folder: Path) -> str | None:
    """The licence in the base's model card, or None when it has no card or names none."""
    if folder.parent == BUILTIN_MODELS:
        return "apache-2.0"
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    named = head.get("license_name") or head.get("license") if isinstance(head, dict) else None
    return str(named) if named else None


def card(
    recipe: dict[str, Any], result: dict[str, Any], base: str | None, licence: str | None, *,
    place: str | None = None, original_layout: str | None = None, gguf: bool = False,
) -> str:  # fmt: skip
    """The model card of a run's weights.

    Args:
        recipe: the resolved recipe; result: result.json.
        base: name of the base, None for a new model; licence: the base's, None when unknown.
        place: where the base is loaded from, seen from the card's folder; the name when unset.
        original_layout: family whose own layout the base (or model) is in, which plain transformers does not read.
        gguf: whether the base is a GGUF file.
    """
    stage, method, model = recipe["stage"], recipe["adapter"]["method"], recipe["model"]
    kind = "A reward model" if stage == "reward" else "A model" if method == "full" else "An adapter"
    name = base and shown_name(base)
    head = {
        **({"base_model": name} if name else {}),
        **({"license": licence} if licence else {}),
        "library_name": "transformers" if method == "full" else "peft",
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "tags": ["ft", stage, method],
    }
    rows = [
        ("base", name or "none: a new model"),
        ("revision of the base", model.get("revision")),
        ("GGUF file of the base", model.get("gguf_file")),
        ("licence of the base", licence or (name and UNKNOWN_LICENCE)),
        ("goes on from", model.get("adapter") and shown_name(model["adapter"])),
        *recipe_rows(recipe, result),
        ("quantization of the base", model.get("quantization")),
        ("rope scaling of the base", model.get("rope_scaling")),
    ]  # fmt: skip
    lines = [
        *front(head), f"# {plain(shown_name(recipe['output']['dir']))}", "",
        f"{kind} made by `ft {stage}` (package ft-recipes); `recipe.yaml` in the run directory makes it again.", "",
        *([f"**A check failed at the end of its training: {result['failed']}.**", ""] if "failed" in result else []),
        *table(rows), "", "## Metrics", "", *metrics_of(result), "", "## Use", "",
        *usage(stage, method, place or name, original_layout, model.get("revision"), gguf), "",
    ]  # fmt: skip
    return "\n".join(lines)


def merged_card(report: dict[str, Any], base: str, licence: str | None, runs: list[Trained], title: str) -> str:
    """The model card of a merged model.

    Args:
        report: merge.json; runs: of the adapters in its order, (recipe, result.json) or None for those of other tools.
    """
    recipe, result = runs[0] or (None, None) if len(runs) == 1 else (None, None)
    stages = {run[0]["stage"] for run in runs if run}
    first = runs[0][0] if runs[0] else None
    if first and Path(base) == Path(first["output"]["dir"]) / "start":  # the run had merged an adapter into it first
        base = first["model"]["name"]
    head = {
        "base_model": shown_name(base), **({"license": licence} if licence else {}), "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["ft", *sorted(stages), report["method"].lower(), "merged"],
    }  # fmt: skip
    parts = [
        (shown_name(run[0]["output"]["dir"] if run else part["adapter"]), part["weight"], run)
        for part, run in zip(report["adapters"], runs, strict=True)
    ]
    trained = [*recipe_rows(recipe, result)] if recipe else [("method", report["method"].lower())]
    if len(runs) > 1:
        found = [name for run in runs if run for name in names_of(run[0]["data"]["train"])]
        trained += [("combined by", combined_by(report)), ("data", ", ".join(dict.fromkeys(found)))]
    rows = [
        ("base", shown_name(base)),
        ("licence of the base", licence or UNKNOWN_LICENCE),
        ("weights of the base", report["base_weights"]),
        ("adapter" if len(parts) == 1 else "adapters",
         ", ".join(f"{name} × {weight:g}" if report.get("combine") else name for name, weight, _ in parts)),
        *trained,
        ("precision", report["dtype"]),
        ("quantization in training", report["quantization"]),
    ]  # fmt: skip
    told = {
        "max_logit_diff": "largest difference of a logit to base + adapter",
        "base_logit_diff": f"the same by rounding the base alone to {report['dtype']}",
        "adapter_effect": "largest change of a logit by the adapter",
        "diff_to_trained_model": "largest difference to the quantized model as trained",
        "compared_tokens": "tokens compared",
        "difference_to_weighted_sum": "distance of the combination to the weighted sum of the adapters, of its size",
    }
    figures = [(what, shown(report[key])) for key, what in told.items() if report.get(key) is not None]
    proof = report["sum"]
    figures += [
        ("layers summed and compared", shown(proof["layers"])),
        ("what the float32 sum misses of the adapter, at most", shown(proof["largest_miss"])),
        ("tensors read back, equal bit by bit", shown(proof["tensors"])),
    ]
    how = python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "", HERE,
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ) if FORMATS[report["format"]].stock else ["```bash", command("chat", "--model", "."), "```"]  # fmt: skip
    measured = ["", "## Metrics", "", *metrics_of(result), "", "Of the adapter on its base, before the merge."]
    unmeasured = ["", "Nothing was measured of the combination: that is done with `ft eval`."]
    what = "An adapter" if len(runs) == 1 else f"{len(runs)} adapters"
    lines = [
        *front(head), f"# {plain(title)}", "", f"{what} merged into the base by `ft merge` (package ft-recipes).", "",
        *table(rows), *(measured if result else unmeasured if len(runs) > 1 else []), "",
        "## Merge", "", *table(figures), "", "## Use", "", *how, "",
    ]  # fmt: skip
    return "\n".join(lines)


def trained_by(adapter: Path) -> Trained:
    """Recipe and result.json of the run that an adapter lies in."""
    found = read_recipe(adapter.parent) if adapter.name == "adapter" else None
    sections = {"stage", "model", "data", "adapter", "train", "eval", "output"}
    if not (isinstance(found, dict) and sections <= found.keys()):
        return None
    result = places.read_json(adapter.parent / "result.json")
    whole = {"trainable_parameters", "total_parameters", "steps", "train_loss"} <= result.keys()
    return found, result if whole else None


def combined_by(report: dict[str, Any]) -> str:
    """cat, ties (density 0.5), …"""
    names = {"density": "density", "seed": "seed", "svd_rank": "rank"}
    settings = ", ".join(f"{what} {report[key]}" for key, what in names.items() if report.get(key) is not None)
    return f"{report['combine']}{f' ({settings})' if settings else ''}"


def recipe_rows(recipe: dict[str, Any], result: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """How weights were trained, and on what.

    Args:
        recipe: resolved; result: result.json, where there is one.
    """
    section = {k: v for k, v in recipe["adapter"].items() if k != "method" and v is not None}
    settings = ", ".join(f"{k} {v}" for k, v in section.items())
    held = [one.path for one in held_sets(recipe["eval"].get("data"))]
    trained, rate = None, recipe["train"]["learning_rate"]
    if result:
        share = result["trainable_parameters"] / max(1, result["total_parameters"])
        trained = (
            f"{shown(result['trainable_parameters'])} of {shown(result['total_parameters'])} parameters "
            f"({share:.2%}), {shown(result['steps'])} steps, learning rate {rate:g}"
        )
    return [
        ("stage", f"`ft {recipe['stage']}`"),
        ("method", f"{recipe['adapter']['method']}{f' ({settings})' if settings else ''}"),
        ("data", ", ".join(names_of(recipe["data"]["train"]))),
        ("held-out data", _split(recipe) or ", ".join(names_of(held))),
        ("trained", trained),
    ]


def metrics_of(result: dict[str, Any] | None) -> list[str]:
    """A run's figures as a table, with their intervals."""
    if not result:
        return []
    metrics = {"training loss": shown(result["train_loss"]), **with_intervals(result.get("eval") or {})}
    metrics = {name.replace("_", " "): value for name, value in metrics.items() if name != "num_tokens"}
    said = "All but the training loss on the held-out data; in brackets 95% intervals. `ft eval` measures answers."
    return [*table(metrics.items()), "", said]


UNKNOWN_LICENCE = "not stated in the base's files: look it up before you pass this on"
HERE = 'folder = "."  # the one this file is in'


def front(head: dict[str, Any]) -> list[str]:
    return ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", ""]


def table(rows: Iterable[tuple[str, Any]]) -> list[str]:
    """Two columns; rows without a value are left out."""
    cells = [(name, plain(value)) for name, value in rows if value]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]


def plain(value: Any) -> str:
    """A text as it stands, in a line of Markdown: no column, no heading and no HTML is made of it."""
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def names_of(given: Any) -> list[str]:
    """Names of data: of local files only the last part, since the rest is somebody's home."""
    listed = given if isinstance(given, list) else [given] if given else []
    return [shown_name(item if isinstance(item, str) else item["path"]) for item in listed]


def place_of(base: str, folder: Path) -> str:
    """What transformers loads the base from: in the directory of a run of `full` it is model/."""
    name = shown_name(base)
    return f"{name}/model" if Path(base).is_absolute() and Path(base).resolve() == folder.parent else name


def _split(recipe: dict[str, Any]) -> str | None:
    split = recipe["data"].get("eval_split")
    if isinstance(split, float):
        return f"{split:g} of the training data, by content"
    return f"{split:,} rows of the training data" if split else None


def usage(
    stage: str, method: str, base: str | None, original_layout: str | None, revision: str | None = None,
    gguf: bool = False, rows: int | None = None,
) -> list[str]:  # fmt: skip
    """How to load it, as Markdown lines; the Python runs in the card's folder.

    Args:
        rows: embeddings that the adapter needs, where the base has another number.
    """
    if original_layout:
        what = ["--model", "."] if method == "full" or base is None else ["--model", base, "--adapter", "."]
        return by_ft(stage, f"In {original_layout}'s original layout, which plain transformers does not read:", what)
    if gguf and method != "full":
        said = "Its base is a GGUF file, of which ft makes a folder that transformers loads:"
        return by_ft(stage, said, ["--adapter", "."])
    auto = "AutoModelForSequenceClassification" if stage == "reward" else "AutoModelForCausalLM"
    if method == "full" or base is None:
        return python(
            f"from transformers import AutoTokenizer, {auto}", "", HERE, f"model = {auto}.from_pretrained(folder)"
        )
    builtin = (BUILTIN_MODELS / base).is_dir()
    where = f'BUILTIN_MODELS / "{base}"' if builtin else json.dumps(base, ensure_ascii=False)
    where += f", revision={json.dumps(revision)}" if revision else ""
    own = of(method).own
    ours = ["import finetune"] if own else []
    ours += ["from finetune.resources import BUILTIN_MODELS"] if builtin else []
    return python(
        *ours, "from peft import PeftModel", f"from transformers import AutoTokenizer, {auto}", "",
        *([f"finetune.register()  # makes {method.upper()} known to peft"] if own else []), HERE,
        f"base = {auto}.from_pretrained({where}{', num_labels=1' if stage == 'reward' else ''})",
        *([f"base.resize_token_embeddings({rows}, mean_resizing=False)"] if rows else []),
        "model = PeftModel.from_pretrained(base, folder)",
    )  # fmt: skip


def by_ft(stage: str, said: str, where: list[str]) -> list[str]:
    """How ft uses it, in the card's folder: a reward model is not talked to."""
    line = command("eval", "RUN", "--reward", ".") if stage == "reward" else command("chat", *where)
    return [said, "", "```bash", line, "```"]


def python(*code: str) -> list[str]:
    return ["```python", *code, "tokenizer = AutoTokenizer.from_pretrained(folder)", "```"]
