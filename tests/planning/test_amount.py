"""What `ft plan` says of rows and steps is what training does with the same data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ft

pytestmark = pytest.mark.whole
ROWS = 150


def write(stage: str, file: Path) -> None:
    draw, rows = Random(0), list[dict[str, Any]]()
    for i in range(ROWS):
        question, answer = f"q{i} " + "x" * draw.randint(1, 20), "y" * draw.randint(3, 90)
        if stage == "sft":
            turns = [("user", question), ("assistant", answer)]
            rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
        elif stage == "dpo":
            rows.append({"prompt": question, "chosen": answer, "rejected": "z" + answer})
        elif stage == "kto":
            rows.append({"prompt": question, "completion": answer, "label": i % 2 == 0})
        elif stage == "ppo":
            rows.append({"prompt": question})
        else:
            rows.append({"text": question + answer})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "split": ("sft", {"data": {"eval_split": 0.1}}),
    "split by number, an epoch and a half": ("sft", {"data": {"eval_split": 7}, "train": {"num_train_epochs": 1.5}}),
    "weighted": ("sft", {"data": {"train": [{"path": "rows.jsonl", "weight": 2.5}]}}),
    "packed": ("sft", {"data": {"packing": True}}),
    "packed, rows given": ("sft", {"data": {"packing": True}, "train": {"per_device_train_batch_size": 2}}),
    "dpo": ("dpo", {"data": {"eval_split": 0.1}}),
    "kto": ("kto", {}),
    "pretrain": ("pretrain", {}),
    "ppo": ("ppo", {"reward": {"functions": ["rules.py:length"]}, "ppo": {"max_new_tokens": 8}}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_and_steps_are_those_of_training(name: str, base: Path, tmp_path: Path) -> None:
    stage, sections = CASES[name]
    write(stage, tmp_path / "rows.jsonl")
    (tmp_path / "rules.py").write_text(
        "def length(prompts, completions, **_):\n    return [1.0 for _ in completions]\n"
    )
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": str(base), "sanity_check": False},
        "data": {"train": "rows.jsonl", "max_length": 128}, "output": {"dir": "out"}, "train": {},
    }  # fmt: skip
    for section, more in sections.items():
        values[section] = {**values.get(section, {}), **more}
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    done = ft("plan", "r.yaml", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    done = ft(stage, "--recipe", "r.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    packed = "packed: " in done.stderr
    assert packed == name.startswith("packed")
    line = next(line for line in done.stderr.splitlines() if ("packed: " if packed else "nothing was written") in line)
    assert re.search(r"(\d+) (?:step|rollout)", line)[1] == str(plan["steps"])  # type: ignore[index]
    rows, passes = re.search(r"(\d+) rows? x (\d+) pass", line).groups()  # type: ignore[union-attr]
    assert int(rows) == plan["per_device_train_batch_size"]
    assert int(passes) == plan["gradient_accumulation_steps"]


def test_data_that_cannot_be_read_is_named(base: Path, tmp_path: Path) -> None:
    """The plan goes on: training may be elsewhere."""
    values = {"version": 1, "stage": "sft", "model": {"name": str(base)}, "data": {"train": "none.jsonl"},
              "output": {"dir": "out"}}  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(values))
    done = ft("plan", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0
    assert "the steps cannot be counted here: " in done.stderr
    assert "none.jsonl" in done.stderr
