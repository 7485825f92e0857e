"""Processor seconds until the first training step is told: ft sft against a bare trl script on the same base and data.

    python benchmarks/start.py [--pairs 5]

And of `ft --help`, of a mistake in the recipe, and of the imports alone. Linux only: /proc tells the seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FT = [sys.executable, "-m", "finetune"]
SETTINGS = ("train.max_steps=1", "eval.data=null", "model.dtype=float32", "train.per_device_train_batch_size=8")
IMPORTS = """
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
"""
BARE = f"""{IMPORTS}
config = SFTConfig("out", max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_length=288,
                   learning_rate=3e-3, report_to="none", logging_steps=1, save_strategy="no", bf16=False,
                   model_init_kwargs={{"dtype": "float32"}})
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
rows = load_dataset("json", data_files="{ROOT}/data_templates/tickets_train.jsonl", split="train")
SFTTrainer("{ROOT}/finetune/builtin/bases/tiny-llama", config, train_dataset=rows, peft_config=lora).train()
"""


def seconds(command: list[str], told: str, folder: str) -> float:
    """Of the process (user and system) until it writes a line that `told` is found in; "" until its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    before = os.times()
    seen = any(re.search(told, line) for line in process.stdout if told)
    if not told:
        process.wait()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system
    spent = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    process.kill()
    process.wait()
    assert seen, f"{command[:4]} never wrote {told!r}"
    return sum(map(int, spent[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    train = [*FT, "sft", "--recipe", "quickstart.yaml", "--output", "run", "--overwrite"]
    train += [word for setting in SETTINGS for word in ("--set", setting)]
    contestants = {
        "ft --help": ([*FT, "--help"], ""),
        "a mistake in the recipe": ([*FT, "sft", "--recipe", "quickstart.yaml", "--set", "data.trian=x"], ""),
        "imports of trl, peft, datasets": ([sys.executable, "-c", IMPORTS], ""),
        "bare trl script, first step": ([sys.executable, "-c", BARE], r"'loss'"),
        "ft sft, first step": (train, r"^step 1/1"),
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.pairs):
            for name, (command, told) in contestants.items():
                found[name].append(seconds(command, told, folder))
    for name, values in found.items():
        print(f"{name:32} {statistics.median(values):6.2f} CPU-s  ({min(values):.2f} to {max(values):.2f})")
    pairs = zip(found["ft sft, first step"], found["bare trl script, first step"], strict=True)
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} pairs"
    print(f"ft / bare trl, first step: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
