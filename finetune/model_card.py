"""README.md beside weights: a model card in the hub's format, with nothing left to fill in.

card(...)          the text
licence_of(base)   what the base's own card says
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from finetune.progress import command
from finetune.recipe import BUILTIN_MODELS
from finetune.report import shown, with_intervals

OWN_METHODS = ("bottleneck", "bitfit", "last_layers")  # peft knows them once finetune is imported


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
    recipe: dict[str, Any], result: dict[str, Any], base: str, licence: str | None, *, original_layout: bool = False
) -> str:
    """The model card of a run's weights.

    Args:
        recipe: the resolved recipe; result: result.json.
        base: name of the base; licence: the base's, None when unknown.
        original_layout: the base is in ChatGLM's own layout, which plain transformers does not read.
    """
    stage, method = recipe["stage"], recipe["adapter"]["method"]
    kind = "reward model" if stage == "reward" else "model" if method == "full" else "adapter"
    head = {
        "base_model": base,
        **({"license": licence} if licence else {}),
        **({"library_name": "peft"} if method != "full" else {"library_name": "transformers"}),
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "tags": ["ft", stage, method],
    }
    section = {k: v for k, v in recipe["adapter"].items() if k != "method" and v is not None}
    settings = ", ".join(f"{k} {v}" for k, v in section.items())
    train = recipe["train"]
    share = result["trainable_parameters"] / max(1, result["total_parameters"])
    rows = [
        ("base", base),
        ("licence of the base", licence or "not stated in the base's files: look it up before you pass this on"),
        ("stage", f"`ft {stage}`"),
        ("method", f"{method}{f' ({settings})' if settings else ''}"),
        ("data", ", ".join(sources(recipe))),
        ("held-out data", _name(recipe["eval"].get("data")) or _split(recipe)),
        ("trained", f"{shown(result['trainable_parameters'])} of {shown(result['total_parameters'])} parameters "
                    f"({share:.2%}), {shown(result['steps'])} steps, learning rate {train['learning_rate']:g}"),
        ("quantization of the base", recipe["model"].get("quantization")),
    ]  # fmt: skip
    metrics = {"training loss": shown(result["train_loss"]), **with_intervals(result.get("eval") or {})}
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", "",
        f"# {_name(recipe['output']['dir'])}", "",
        f"A {kind} made by `ft {stage}` (package ft-recipes); `recipe.yaml` in the run directory makes it again.", "",
        "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value), "",
        "## Metrics", "",
        "| | |", "|---|---|", *(f"| {name.replace('_', ' ')} | {value} |" for name, value in metrics.items()), "",
        "In brackets 95% intervals. `ft eval` of the run directory measures answers.", "",
        "## Use", "", *usage(stage, method, base, original_layout), "",
    ]  # fmt: skip
    return "\n".join(lines)


def sources(recipe: dict[str, Any]) -> list[str]:
    """Names of the training data: of local files only the last part, since the rest is somebody's home."""
    given = recipe["data"]["train"]
    listed = given if isinstance(given, list) else [given]
    return [_name(item if isinstance(item, str) else item["path"]) or "" for item in listed]


def _name(path: str | None) -> str | None:
    return path if path is None or path.startswith("builtin:") or not Path(path).is_absolute() else Path(path).name


def _split(recipe: dict[str, Any]) -> str | None:
    split = recipe["data"].get("eval_split")
    return f"{split:g} of the training data, by content" if split else None


def usage(stage: str, method: str, base: str, original_layout: bool) -> list[str]:
    """How to load it, as Markdown lines."""
    if original_layout:
        return [
            "The base is in ChatGLM's original layout, which plain transformers does not read:", "",
            "```bash", command("chat", "--model", base, "--adapter", "FOLDER"), "```",
        ]  # fmt: skip
    builtin = (BUILTIN_MODELS / base).is_dir()
    where = f'BUILTIN_MODELS / "{base}"' if builtin else f'"{base}"'
    auto = "AutoModelForSequenceClassification" if stage == "reward" else "AutoModelForCausalLM"
    options = ", num_labels=1" if stage == "reward" else ""
    if method == "full":
        code = [f"from transformers import AutoTokenizer, {auto}", "", f'model = {auto}.from_pretrained("FOLDER")']
    else:
        own = ["import finetune  # makes its methods known to peft"] if method in OWN_METHODS else []
        own += ["from finetune.recipe import BUILTIN_MODELS"] if builtin else []
        code = [
            *own, "from peft import PeftModel", f"from transformers import AutoTokenizer, {auto}", "",
            f"base = {auto}.from_pretrained({where}{options})",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]  # fmt: skip
    return ["```python", *code, 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```"]
