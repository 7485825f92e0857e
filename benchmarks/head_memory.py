"""Peak memory of an SFT pass with a large vocabulary: ft's, which scores trained positions only, against all logits.

    python benchmarks/head_memory.py [--model qwen2.5-0.5b] [--rows 8] [--length 384] [--trained 0.3]

A random model of a published shape, LoRA on all linear layers, both in bfloat16 on the same rows, peaks of the bytes
that torch's allocator has handed out (as benchmarks/memory.py counts them). All logits: transformers' own loss,
`model(**batch, labels=labels).loss.backward()`.
"""

from __future__ import annotations

import argparse
import json
import string
import tempfile
from pathlib import Path
from random import Random

import torch
import yaml
from memory import measured, watched, write_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.commands import sft
from finetune.recipe.file import load
from finetune.recipe.stages import RECIPES


def rows_of(count: int, length: int, trained: float) -> list[dict[str, str]]:
    draw, answer = Random(0), int(length * trained)
    texts = ["".join(draw.choices(string.ascii_letters, k=length - 2)) for _ in range(count)]
    return [{"prompt": text[:-answer], "completion": text[-answer:]} for text in texts]


def ours(model: Path, rows: list[dict[str, str]], length: int, folder: Path) -> int:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "version": 1, "stage": "sft", "model": {"name": str(model), "sanity_check": False, "dtype": "bfloat16"},
        "data": {"train": str(data), "max_length": length}, "adapter": {"method": "lora", "r": 16},
        "train": {"effective_batch_size": len(rows), "per_device_train_batch_size": len(rows), "max_steps": 2,
                  "warmup_steps": 0},
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    found: list[int] = []
    with measured(found):
        sft.run(load(str(folder / "recipe.yaml"), RECIPES["sft"]))
    return max(found)


def plain(model: Path, rows: list[dict[str, str]]) -> int:
    """Two passes of what most training scripts do, with the optimizer's steps."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    whole = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    ids = torch.tensor(whole)
    labels = ids.clone()
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), config)
    tuned.train()
    optimizer = torch.optim.AdamW(p for p in tuned.parameters() if p.requires_grad)
    found: list[int] = []
    with watched(found, [tuned]):
        for _ in range(2):
            tuned(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return max(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    options.add_argument("--model", default="qwen2.5-0.5b")
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--length", type=int, default=384)
    options.add_argument("--trained", type=float, default=0.3)
    given = options.parse_args()
    rows = rows_of(given.rows, given.length, given.trained)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(given.model, folder / "model")
        weights = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        full, part = plain(folder / "model", rows), ours(folder / "model", rows, given.length, folder)
    print(f"{given.model}, {given.rows} x {given.length} tokens, {given.trained:.0%} trained, LoRA, bfloat16")
    print(f"all logits {full / 1e9:.2f} GB, ft {part / 1e9:.2f} GB: {part / full:.2f}")
    print(f"beside the weights ({weights / 1e9:.2f} GB): {(part - weights) / (full - weights):.2f}")


if __name__ == "__main__":
    main()
