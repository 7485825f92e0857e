"""Recipes of `ft reward` and `ft ppo` on the random base, run in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import ft, write_rows

from finetune.child import PART
from finetune.commands import ppo, reward
from finetune.recipe.file import load
from finetune.recipe.stages import PpoRecipe, RewardRecipe
from finetune.run.directory import Run

# A random byte model meets the property now and then, and can learn it.
LETTERS = """
def score(prompts, completions, **columns):
    return [sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in completions]
"""


def pairs(folder: Path, n: int = 32) -> Path:
    """Terse answers are preferred, which the head as it is drawn gets wrong."""
    rows = [{"prompt": f"say {i}", "chosen": f"{i} no", "rejected": f"{i} yes please"} for i in range(n)]
    return write_rows(folder / "pairs.jsonl", rows)


def prompts(folder: Path, n: int = 32) -> Path:
    return write_rows(folder / "prompts.jsonl", [{"prompt": f"say {i * 37 % 100}"} for i in range(n)])


def rule(folder: Path, text: str = LETTERS, name: str = "rule.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def scaled(base: Path, folder: Path, factor: float) -> Path:
    """The same base with another output head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def write(path: Path, values: dict[str, Any], sections: dict[str, Any]) -> Path:
    for name, section in sections.items():
        fresh = name == "adapter" and "method" in section
        values[name] = section if fresh else {**values.get(name, {}), **section}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def reward_recipe(folder: Path, base: Path, name: str = "reward", **sections: Any) -> Path:
    data = folder / "pairs.jsonl"
    values: dict[str, Any] = {
        "version": 1, "stage": "reward",
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(data if data.exists() else pairs(folder)), "max_length": 64},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "train": {"max_steps": 6, "effective_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1},
        "output": {"dir": str(folder / name)},
    }  # fmt: skip
    return write(folder / f"{name}.yaml", values, sections)


def ppo_recipe(folder: Path, base: Path, name: str = "ppo", **sections: Any) -> Path:
    """Without a `reward` section the rule LETTERS scores."""
    data, file = folder / "prompts.jsonl", folder / "rule.py"
    values: dict[str, Any] = {
        "version": 1, "stage": "ppo",
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(data if data.exists() else prompts(folder)), "max_length": 64},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "train": {
            "max_steps": 2, "effective_batch_size": 16, "learning_rate": 5e-3, "logging_steps": 1,
            "lr_scheduler_type": "constant", "warmup_steps": 0,
        },
        "ppo": {"max_new_tokens": 8, "num_mini_batches": 2, "missing_eos_penalty": 0.0},
        "output": {"dir": str(folder / name)},
    }  # fmt: skip
    if "reward" not in sections:
        sections["reward"] = {"functions": [f"{file if file.exists() else rule(folder)}:score"]}
    return write(folder / f"{name}.yaml", values, sections)


def run_reward(path: Path, resume: bool = False) -> Run:
    recipe = load(str(path), RewardRecipe)
    reward.run(recipe, resume=resume)
    return Run(Path(recipe.output.dir))


def run_ppo(path: Path, *overrides: str, resume: bool = False, overwrite: bool = False) -> Run:
    recipe = load(str(path), PpoRecipe, overrides)
    ppo.run(recipe, resume=resume, overwrite=overwrite)
    return Run(Path(recipe.output.dir))


def here(*arguments: str, shown: bool = False) -> tuple[int, str]:
    """In the place of `child.run`: a part of a command in this process, without its nine seconds of imports."""
    done = ft(PART, *arguments)
    if shown:
        print(done.stderr, end="", file=sys.stderr)
    return done.returncode, done.stderr.strip()


def logged(found: Run, key: str) -> list[Any]:
    return [row[key] for row in found.read_metrics() if key in row]


def comparable(found: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock says."""
    timed = ("tokens_per_second", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in timed} for row in found.read_metrics()]


def result(found: Run) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(found.result.read_text(encoding="utf-8"))
    return read
