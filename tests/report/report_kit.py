"""Runs as they lie on disk, made without training, for the tests of reports and of `ft runs`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from finetune.run.directory import MARK

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>{{ 7*7 }} &amp; \u202egnp"
VERSIONS = {"ft": "0.1.0", "python": "3.11", "torch": "2.13.0"}


def make_run(
    folder: Path, *, stage: str = "sft", steps: int = 40, text: str = "hello", result: Any = (), done: bool = True,
    evaluated: bool = True, **sections: Any,
) -> Path:  # fmt: skip
    """A run with everything a report tells; `text` stands wherever data can bring text."""
    folder.mkdir(parents=True)
    recipe = {
        "version": 1, "stage": stage, "model": {"name": "tiny-llama"}, "data": {"train": [text], "max_length": 64},
        "adapter": {"method": "lora", "r": 8}, "train": {"learning_rate": 2e-4, "seed": 42},
        "output": {"dir": str(folder)}, **sections,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(f"# ft {stage}\n{MARK}\n" + yaml.safe_dump(recipe), encoding="utf-8")
    write_json(folder / "data_audit.json", audit(text))
    lines = [json.dumps(row) for row in rows(steps, stage)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if stage == "ppo":
        sample = {"step": steps, "prompt": text, "reply": text, "score": 0.5}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    if evaluated:
        write_json(folder / "evaluation.json", evaluation(text))
    if done:
        values = {
            "stage": stage, "status": "done", "eval": {"loss": 0.5, "loss_ci": [0.4, 0.6]}, "train_loss": 0.7,
            "steps": steps, "seconds": 75.0, "trainable_parameters": 1000, "total_parameters": 20000,
            "peak_memory_gb": 1.25, "decisions": [text], "data": {"rows": 64, "used": 63}, "versions": VERSIONS,
            "machine": {"device": "cpu", "cores": 2}, **dict(result),
        }  # fmt: skip
        write_json(folder / "result.json", values)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def rows(steps: int, stage: str) -> list[dict[str, Any]]:
    found = []
    for step in range(1, steps + 1):
        noise = math.sin(step * 1.7) / 7
        row = {
            "step": step, "epoch": step / 10, "loss": 2.123456789 / step + 0.3 + noise,
            "grad_norm": 0.731234567 + noise,
            "learning_rate": 2e-4 * (1 - step / steps), "entropy": 1.23456789 + noise, "num_tokens": step * 100.0,
            "tokens_per_second": 1500.1 + 100 * noise, "peak_memory_gb": 1.25, "mean_token_accuracy": 0.812345 + noise,
        }  # fmt: skip
        if stage == "ppo":
            row |= {"reward_mean": noise, "kl": abs(noise), "eos_rate": 0.5, "clip_fraction": 0.1, "value_loss": 0.4}
        found.append(row)
        if step % 10 == 0:
            found.append(
                {"step": step, "eval_loss": 0.9 + noise, "eval_exact_match": 0.5, "eval_exact_match_ci": [0.4, 0.6]}
            )
    return found


def audit(text: str) -> dict[str, Any]:
    return {
        "counts": {"rows": 64, "used": 63, "duplicates": 1}, "languages": {"en": 60, "zh": 4},
        "kinds": {"duplicate": 1},
        "tokens": {"16-31": 40, "32-63": 24}, "characters": {},
        "problems": [{"level": "warning", "file": f"/home/me/{text}", "row": 3, "kind": "duplicate", "message": text}],
        "preview": [{"file": "/home/me/rows.jsonl", "row": 1, "tokens": 9, "trained": 4,
                     "parts": [[False, f"user {text}"], [True, f"答案 {text}"]]}],
    }  # fmt: skip


def evaluation(text: str) -> dict[str, Any]:
    row = {"row": 7, "asked": text, "reference": text, "base": text, "tuned": text, "change": "worse"}
    found = {
        "name": "test", "data": "/home/me/test.jsonl", "general": False, "n": 60, "kind": "answers",
        "before": {"exact_match": 0.25, "exact_match_ci": [0.1, 0.4]},
        "after": {"exact_match": 0.75, "exact_match_ci": [0.6, 0.9], "fields": {"a": 1}},
        "comparisons": [{"a": "base", "b": "run", "metric": "exact_match", "difference": 0.5, "ci": [0.3, 0.7],
                         "wins": 31, "losses": 1, "ties": 28, "n": 60}],
        "by": "exact_match", "changed": 32, "rows": [row, {**row, "row": 8, "change": "better"}],
    }  # fmt: skip
    return {"command": "eval", "sets": [found], "versions": VERSIONS}
