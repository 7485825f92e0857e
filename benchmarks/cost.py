"""What a training step costs and what it depends on: length, rows, vocabulary, adapters; and what it reaches of a plain
matrix product's speed.

    python benchmarks/cost.py [--folder runs/cost] [--only length,batch,rows,vocabulary,adapters] [--plot]

Runs `ft sft` on random Llamas of 11M parameters beside the embeddings, in float32, and writes cost.json and cost.png
into the folder. Processor seconds of a step, the least of the last three: what else the machine does hardly counts.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.commands import sft
from finetune.models import tokenizers
from finetune.recipe.file import load
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import SftRecipe

HIDDEN, LAYERS, INNER, STEPS = 384, 6, 1024, 4
POINTS: dict[str, list[dict[str, Any]]] = {
    "length": [{"length": n} for n in (64, 128, 256, 512, 1024)],
    "batch": [{"batch": n} for n in (1, 2, 4, 8, 16)],
    "rows": [{"rows": n} for n in (16, 32, 64)],
    "vocabulary": [{"vocabulary": n} for n in (2_000, 8_000, 32_000, 128_000)],
    "adapters": [
        *({"adapter": {"method": "lora", "r": r}} for r in (2, 8, 128)),
        *({"adapter": {"method": m}} for m in ("ia3", "vera", "oft", "loha", "bitfit", "prompt_tuning", "full")),
        {"adapter": {"method": "lora", "r": 8, "use_dora": True}},
    ],
}
MIDDLE = {"length": 256, "batch": 4, "rows": 16, "vocabulary": 8_000, "adapter": {"method": "lora", "r": 8}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/cost"))
    parser.add_argument("--only", default=",".join(POINTS))
    parser.add_argument("--plot", action="store_true", help="only draw what was measured")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "cost.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for what in () if given.plot else given.only.split(","):
        found[what] = []
        for point in POINTS[what]:
            found[what].append({**point, **measured(folder, **{**MIDDLE, **point})})
            print(what, json.dumps(found[what][-1]), flush=True)
            kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(found, folder / "cost.png")


def product(size: int, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a plain product of `size` rows with the block's widest matrix, best of ten."""
    a, b = torch.randn(size, HIDDEN, dtype=dtype), torch.randn(HIDDEN, INNER, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        begun = time.process_time()
        for _ in range(10):
            a @ b
        best = min(best, (time.process_time() - begun) / 10)
    return 2 * size * HIDDEN * INNER / best


def base(folder: Path, vocabulary: int) -> Path:
    place = folder / f"base-{vocabulary}"
    if not place.exists():
        tokenizer = tokenizers.load_tokenizer(ModelConfig(name="tiny-llama"))
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=max(vocabulary, len(tokenizer)), hidden_size=HIDDEN, intermediate_size=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=6, max_position_embeddings=4096, tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def measured(
    folder: Path, length: int, batch: int, rows: int, vocabulary: int, adapter: dict[str, Any]
) -> dict[str, float]:
    """Seconds of a step and of the passes in it, its FLOPs, and those per second of a plain product."""
    place = base(folder, vocabulary)
    data, path = folder / "rows.jsonl", folder / "recipe.yaml"
    count = max(rows, batch)
    chat = [{"role": "user", "content": "say a b c"}, {"role": "assistant", "content": "a b c " * length}]
    data.write_text((json.dumps({"messages": chat}) + "\n") * count, encoding="utf-8")
    steps = -(-count // batch) if rows != MIDDLE["rows"] else STEPS
    path.write_text(yaml.safe_dump({
        "version": 1, "stage": "sft", "model": {"name": str(place), "dtype": "float32", "sanity_check": False},
        "data": {"train": str(data), "max_length": length}, "adapter": adapter,
        "train": {"max_steps": steps, "effective_batch_size": batch, "per_device_train_batch_size": batch,
                  "logging_steps": 1, "learning_rate": 1e-4},
        "output": {"dir": str(folder / "run")},
    }), encoding="utf-8")  # fmt: skip
    ends, plain = [], transformers.Trainer.training_step
    inside: list[float] = []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        result = plain(self, *args, **kwargs)
        ends.append(time.process_time())
        inside.append(ends[-1] - begun)
        return result

    transformers.Trainer.training_step = training_step  # type: ignore[method-assign]
    try:
        sft.run(load(str(path), SftRecipe), overwrite=True)
    finally:
        transformers.Trainer.training_step = plain  # type: ignore[method-assign]
    told = [b - a for a, b in pairwise(ends[1:])]  # the longest rows went first
    tokens = length * batch
    # Forward and gradients of activations: 2 FLOPs each per weight and token; of weights as much, where they learn.
    weights = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    attention = LAYERS * 2 * 2 * length * HIDDEN * tokens * 3 / 2  # causal: half of it, backward twice as much
    flops = (
        2 * weights * tokens * (3 if adapter["method"] == "full" else 2) + 4 * HIDDEN * vocabulary * tokens + attention
    )
    return {
        "seconds": min(told), "passes": min(inside[1:]), "all": ends[-1] - ends[0], "flops": flops,
        "product": product(min(tokens, 2048)),
    }  # fmt: skip


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in POINTS if found.get(name)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.5), layout="constrained", squeeze=False)
    for name, panel in zip(names, axes[0], strict=True):
        points = found[name]
        if name == "adapters":
            labels = [" ".join(k if v is True else str(v) for k, v in p["adapter"].items()) for p in points]
            panel.barh(labels, [p["seconds"] for p in points])
            panel.set_xlabel("CPU-s a step")
        else:
            key = "all" if name == "rows" else "seconds"
            panel.plot([p[name] for p in points], [p[key] for p in points], "o-")
            panel.set_xlabel(
                {"length": "tokens of a row", "batch": "rows of a pass", "rows": "rows of the data"}.get(name, name)
            )
            panel.set_ylabel("CPU-s of an epoch" if name == "rows" else "CPU-s a step")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.grid(alpha=0.3)
        panel.set_title(name, fontsize="medium")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
