"""DPO: the losses of ft with the batches in trl's order, beside trl's, and what ft's reference takes before them.

    python benchmarks/peers/same_order.py [--folder DIR]

After `compare.py --only dpo` in that folder, whose runs of number 0 are read. ft puts rows of similar length together,
so that its batches, and each loss, are others; here its sampler is replaced by the order that accelerate gives trl.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune.cli import main as ft
from finetune.training import reference
from finetune.training.trainers import Extras

SEED = 42


class AsTrl:
    """accelerate's SeedableRandomSampler, in its first epoch."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        order: list[int] = torch.randperm(self.rows, generator=torch.Generator().manual_seed(SEED)).tolist()
        return iter(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    folder = parser.parse_args().folder.resolve() / "results" / "dpo"
    events = [json.loads(line) for line in (folder / "trl_CLI" / "0" / "events.jsonl").read_text().splitlines()]
    passes = [event["loss"] for event in events if event["event"] == "pass"]
    theirs = passes[: len(passes) // 2]
    recipe = json.loads((folder / "ft" / "0" / "ft_dpo.yaml").read_text())
    recipe["output"]["dir"] = str(folder / "same_order")
    recipe["train"] |= {"max_steps": len(theirs), "num_train_epochs": 1}
    path = folder / "same_order.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(dir=folder)  # or the reference may be known already
    took: list[float] = []
    add = reference.add

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.process_time()
        try:
            return add(*given, **named)
        finally:
            took.append(time.process_time() - begun)

    Extras._get_train_sampler = lambda self, rows=None: AsTrl(len(self.train_dataset))  # type: ignore[assignment,return-value]
    reference.add = timed
    sys.argv = ["ft", "dpo", "--recipe", str(path), "--overwrite"]
    try:
        ft()
    except SystemExit as ended:
        if ended.code:
            raise
    rows = [json.loads(line) for line in (folder / "same_order" / "metrics.jsonl").read_text().splitlines()]
    ours = [row["loss"] for row in rows if "loss" in row]
    print("| step | ft | trl |\n|---|---|---|")
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        print(f"| {step} | {one:.4f} | {other:.4f} |")
    print(f"largest difference {max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e}")
    print(f"the reference of {recipe['train']['max_steps']} steps' pairs: {sum(took):.2f} CPU-s")


if __name__ == "__main__":
    main()
