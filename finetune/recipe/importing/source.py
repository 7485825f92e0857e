"""What another tool's file says: a YAML or JSON mapping, or the options of a command line in a script."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import UserError
from finetune.recipe.reading import parse_value, recipe_text
from finetune.recipe.reading import read as as_recipe

LLAMA_FACTORY, AXOLOTL, SWIFT, TRL = "LLaMA-Factory", "axolotl", "ms-swift", "trl"
COMMANDS = (
    (LLAMA_FACTORY, r"llamafactory-cli\s+train|lmf\s+train|src/train(?:_bash)?\.py"),
    (AXOLOTL, r"axolotl\s+train|axolotl\.cli\.train"),
    (SWIFT, r"swift\s+(sft|pt|rlhf)\b|swift/cli/(sft|pt|rlhf)\.py"),
    (TRL, r"trl\s+(sft|dpo|kto|reward|grpo|rloo)\b|trl/scripts/(sft|dpo|kto|reward|grpo|rloo)\.py"),
)
"""(tool, how its training is begun; a group is the stage)"""
KEYS = (
    (LLAMA_FACTORY, {"finetuning_type", "cutoff_len", "lora_target", "do_train", "template"}),
    (AXOLOTL, {"base_model", "sequence_len", "micro_batch_size", "val_set_size", "lora_target_linear"}),
    (SWIFT, {"tuner_type", "train_type", "rlhf_type", "split_dataset_ratio", "torch_dtype", "attn_impl"}),
    (TRL, {"dataset_name", "use_peft", "model_name_or_path", "lora_target_modules"}),
)
"""What is told by its keys: the tool of which most are there."""
LISTS = {"dataset", "val_dataset", "target_modules", "lora_target_modules", "modules_to_save", "report_to", "adapters"}


@dataclass(frozen=True)
class Source:
    tool: str
    word: str
    """The stage of a command line; "" where the keys say it."""
    keys: dict[str, Any]
    path: Path


def read(path: Path) -> Source:
    """UserError for what no tool is known to read as a training config."""
    text = recipe_text(path)
    command = next((found for tool, begin in COMMANDS if (found := of_command(tool, begin, text, path))), None)
    if command is not None:
        return command
    try:
        values = parse_value(text)
    except yaml.YAMLError:
        if path.suffix.lower() in (".yaml", ".yml", ".json"):
            as_recipe(path)  # says where
        values = None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        tools = "LLaMA-Factory, axolotl, ms-swift or trl"
        raise UserError(f"neither a config nor a command line of {tools}", path=path, fix="give their YAML or script")
    return of_keys(values, path)


def of_keys(values: dict[str, Any], path: Path) -> Source:
    if {"version", "stage"} <= values.keys() and isinstance(values.get("model"), dict):
        run = f"ft {values['stage']} --recipe {shlex.quote(str(path))}"
        raise UserError("is a recipe already", path=path, fix=f"run it: {run}")
    if "compute_environment" in values:
        raise UserError(
            "is accelerate's, and says nothing of what is trained", path=path, fix="give the training config"
        )
    if "model_class" in values or ("model" in values and "train_dataset" in values):
        raise UserError("is of LLaMA-Factory's v1, which is not read so far", path=path, fix="give a v0 config")
    tool, known = max(((tool, len(keys & values.keys())) for tool, keys in KEYS), key=lambda pair: pair[1])
    if not known:
        raise UserError("no key of LLaMA-Factory, axolotl, ms-swift or trl is in it", path=path)
    return Source(tool, "", values, path)


def of_command(tool: str, begin: str, text: str, path: Path) -> Source | None:
    """The last training command of a tool in a script; its config file where it names one."""
    text = re.sub(r"(?<=\s)#\s[^\n]*", "", text)  # what is said behind an option; datasets have numbers behind a #
    text = re.sub(r"\\\s*\n", " ", text)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = [(line, match) for line in lines if (match := re.search(begin, line))]
    if not found:
        return None
    line, match = found[-1]
    word = next((group for group in match.groups() if group), "")
    known = dict(re.findall(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|\S*)", "\n".join(lines), re.M))
    rest = re.sub(r"\$\{?([A-Za-z_]\w*)\}?", lambda m: known.get(m[1], m[0]).strip("\"'"), line[match.end() :])
    try:
        words = shlex.split(re.split(r"\s(?:[|&;>]|2>)", rest)[0])
    except ValueError as error:
        raise UserError(f"a command line that cannot be read ({error})", path=path) from None
    keys = options(words)
    config = keys.pop("config", None) or (words[0] if words and words[0].endswith((".yaml", ".yml", ".json")) else None)
    if config is not None:
        place = next((p for p in (path.parent / str(config), Path(str(config))) if p.is_file()), None)
        if place is None:
            raise UserError(f"names {config}, which is not here", path=path, fix="import that file")
        inner = of_keys(parse_value(recipe_text(place)), place)
        keys = {**inner.keys, **keys}
    return Source(tool, word, keys, path)


def options(words: list[str]) -> dict[str, Any]:
    """--key value, --key=value, --flag; several values are a list."""
    found: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, sign, value = word[2:].replace("-", "_").partition("=")
            found[key] = value if sign else []
        elif key is not None and isinstance(found[key], list):
            found[key].append(word)
        elif key is not None and key in LISTS:
            found[key] = [found[key], word]
    return {key: given(key, value) for key, value in found.items()}


def given(key: str, value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            return True
        return [str(one) for one in value] if len(value) > 1 or key in LISTS else given(key, value[0])
    try:
        return parse_value(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value
