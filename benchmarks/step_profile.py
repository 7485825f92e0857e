"""What a training step reaches of plain matrix products of its own shapes and precision, and the gap by part.

    python benchmarks/step_profile.py [--shape 15m|smollm2] [--dtype float32] [--rows 4] [--length 256] [--folder DIR]

`ft sft` with LoRA r 8 on a random Llama. Steps 2 to 4 are timed (processor seconds), 5 to 7 go through torch.profiler,
which says each operation's share and shapes; then every product of these shapes is timed alone, in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.commands import sft
from finetune.models import tokenizers
from finetune.recipe.file import load
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import SftRecipe

RANK, TIMED, PROFILED = 8, 3, 3
CHUNK = 32_768
"""Of the vocabulary, that trl's loss goes through at once."""
SHAPES: dict[str, dict[str, Any]] = {
    "15m": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024, "vocab_size": 8192,
            "num_attention_heads": 6},
    "smollm2": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 49152,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}  # fmt: skip
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}
"""Where its two matrices begin; what is added comes before them."""
KINDS = {
    "attention": ("scaled_dot_product",),
    "multiplications (LoRA's scale, norms, rotary positions, gates)": ("aten::mul", "aten::silu", "aten::rsqrt"),
    "additions (LoRA's onto its layer, residuals, gradients that meet)": ("aten::add",),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero_"),
}
Size = tuple[int, int, int, int]
"""Of a product: (how many, rows, inner, columns)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/step_profile"))
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    recipe = written(folder, given.shape, given.dtype, given.rows, given.length)
    seconds, watched = steps(recipe)
    show(seconds, watched, getattr(torch, given.dtype), SHAPES[given.shape]["vocab_size"])


def written(folder: Path, shape: str, dtype: str, rows: int, length: int) -> Path:
    place = folder / f"base-{shape}"
    if not place.exists():
        tokenizer = tokenizers.load_tokenizer(ModelConfig(name="tiny-llama"))
        torch.manual_seed(0)
        config = LlamaConfig(
            max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None, **SHAPES[shape],
        )  # fmt: skip
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
        tokenizer.save_pretrained(place)
    chat = [{"role": "user", "content": "say a b c"}, {"role": "assistant", "content": "a b c " * length}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * rows * 2, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "version": 1, "stage": "sft", "model": {"name": str(place), "dtype": dtype, "sanity_check": False},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": length},
        "adapter": {"method": "lora", "r": RANK},
        "train": {"max_steps": 1 + TIMED + PROFILED, "effective_batch_size": rows, "per_device_train_batch_size": rows,
                  "learning_rate": 1e-4},
        "output": {"dir": str(folder / "run")},
    }), encoding="utf-8")  # fmt: skip
    return path


def steps(recipe: Path) -> tuple[float, profile]:
    """(processor seconds of a step, the profile of PROFILED others). The passes alone: forward and backward."""
    plain, told = transformers.Trainer.training_step, list[float]()
    watch = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        number = len(told) - 1  # the longest rows go first
        if number == 1 + TIMED:
            watch.start()
        begun = time.process_time()
        result = plain(self, *args, **kwargs)
        told.append(time.process_time() - begun)
        if number == TIMED + PROFILED:
            watch.stop()
        return result

    transformers.Trainer.training_step = training_step  # type: ignore[method-assign]
    try:
        sft.run(load(str(recipe), SftRecipe), overwrite=True)
    finally:
        transformers.Trainer.training_step = plain  # type: ignore[method-assign]
    return statistics.median(told[2 : 2 + TIMED]), watch


def size_of(event: Any) -> Size | None:
    """None for what is no product."""
    if event.key not in PRODUCTS:
        return None
    a, b = [shape for shape in event.input_shapes if shape][PRODUCTS[event.key] :][:2]
    return (a[0] if len(a) == 3 else 1), a[-2], a[-1], b[-1]


def kind_of(event: Any, vocabulary: int) -> str:
    widths = (vocabulary, CHUNK, vocabulary % CHUNK)
    if any(len(shape) == 2 and shape[-1] in widths for shape in event.input_shapes):
        return "the loss beside its products"
    return next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "everything else")


def alone(size: Size, dtype: torch.dtype) -> float:
    """Processor seconds of such a product, the least of five."""
    many, rows, inner, columns = size
    a, b = torch.randn(many, rows, inner).to(dtype), torch.randn(many, inner, columns).to(dtype)
    if many == 1:
        a, b = a[0], b[0]
    repeated, best = max(1, int(2e8 / (many * rows * inner * columns))), float("inf")
    for _ in range(5):
        begun = time.process_time()
        for _ in range(repeated):
            a @ b
        best = min(best, (time.process_time() - begun) / repeated)
    return best


def show(seconds: float, watched: profile, dtype: torch.dtype, vocabulary: int) -> None:
    parts = Counter[str]()
    sizes: dict[str, Counter[Size]] = {"products of the base": Counter(), "products of LoRA": Counter()}
    for event in watched.key_averages(group_by_input_shape=True):
        kind = kind_of(event, vocabulary)
        if (size := size_of(event)) is not None:
            kind = f"products of {'LoRA' if min(size[1:]) <= RANK else 'the base'}"
            sizes[kind][size] += event.count
        parts[kind] += event.self_cpu_time_total
    flops = {
        kind: sum(2 * n * math.prod(size) for size, n in these.items()) / PROFILED for kind, these in sizes.items()
    }
    plain = {kind: sum(n * alone(size, dtype) for size, n in these.items()) / PROFILED for kind, these in sizes.items()}
    print("\n| part | share of the time | GFLOP/s | the same products alone |\n|---|---|---|---|")
    for name, took in parts.most_common():
        share, rates = took / parts.total(), ["", ""]
        if name in sizes:
            rates = [f"{flops[name] / s / 1e9:.0f}" for s in (seconds * share, plain[name])]
        print(f"| {name} | {share:.1%} | {' | '.join(rates)} |")
    work, least = sum(flops.values()) / 1e9, sum(plain.values())
    print(f"\nA step's passes: {seconds:.2f} CPU-s, {work:.0f} GFLOP in products, {work / seconds:.0f} GFLOP/s")
    print(f"The same products alone: {least:.2f} CPU-s, {work / least:.0f} GFLOP/s; that is {least / seconds:.0%}")


if __name__ == "__main__":
    main()
