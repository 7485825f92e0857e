"""`ft doctor`: what is installed, what the machine can do, and what `auto` will mean on it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from typing import Any

import torch

from finetune.language import translated
from finetune.models import hardware, sources
from finetune.recipe.resolve import compute_dtype
from finetune.run import json_option
from finetune.run.directory import versions
from finetune.terminal.progress import say
from finetune.terminal.values import padded

# module -> what is missing without it
EXTRAS = {
    "flash_attn": "model.attn_implementation: flash_attention_2 on CUDA GPUs",
    "bitsandbytes": "8-bit optimizers",
    "modelscope": "models from ModelScope",
    "sacrebleu": "BLEU and chrF in ft eval (pip install 'ft-recipes[eval]')",
    "jieba": "ROUGE of Chinese words in ft eval (pip install 'ft-recipes[eval]')",
    "gguf": "GGUF files as bases",
    "fastapi": "ft serve (pip install 'ft-recipes[serve]')",
    "llguidance": "answers of ft serve that follow a JSON schema (pip install 'ft-recipes[serve]')",
}
# What trains -> bytes per parameter of the base; a fifth of the memory is left to activations and the system.
BYTES = {"LoRA on INT4": 0.7, "LoRA on bfloat16": 2.1, "all weights": 16.0}


def fitting(memory_gb: float) -> dict[str, float]:
    """Billions of parameters that a device of this memory can train."""
    return {what: 0.8 * memory_gb / size for what, size in BYTES.items()}


def matrix_products(device: str, kind: str, size: int = 1024, seconds: float = 0.5) -> float:
    """GFLOP/s of square matrix products in `kind`, all threads, the best of half a second."""
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, kind)) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        wait()
        begun = time.perf_counter()
        left @ right
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - begun) / 1e9)
    return best


def findings() -> dict[str, Any]:
    """Of this machine: versions, hardware, precision, speed; what fits, in billions of parameters; what is missing."""
    machine = hardware.detect()
    return {
        "versions": versions(),
        "device": {
            "kind": machine.device, "memory_gb": machine.memory_gb, "threads": torch.get_num_threads(),
            "name": torch.cuda.get_device_name() if machine.device == "cuda" else None,
        },
        "precision": {"auto": compute_dtype("auto", machine), "native_bfloat16": machine.bf16},
        "gflops": {kind: matrix_products(machine.device, kind) for kind in ("float32", "bfloat16")},
        "fits_billions": fitting(machine.memory_gb),
        "disk_free_gb": shutil.disk_usage(".").free / 1e9,
        "builtin_bases": sources.builtin_names(),
        "missing": {name: what for name, what in EXTRAS.items() if importlib.util.find_spec(name) is None},
    }  # fmt: skip


def run(json_file: str | None = None) -> None:
    json_option.check(json_file, "versions", "device")
    found = findings()
    json_option.write(json_file, found)
    if json_file is not None:
        return
    for name, version in found["versions"].items():
        say(f"{name:14} {version}")
    device, precision, speed = found["device"], found["precision"], found["gflops"]
    name = device["name"] or translated(f"{device['threads']} threads")
    entry("device", f"{device['kind']} ({name}), {device['memory_gb']:.0f} GB")
    why = "native bfloat16" if precision["native_bfloat16"] else "no native bfloat16"
    entry("precision", f"auto = {precision['auto']} ({why}); trainable weights float32")
    entry("speed", ", ".join(f"{kind} {value:,.0f} GFLOP/s" for kind, value in speed.items()))
    if device["kind"] == "cpu" and precision["native_bfloat16"] and speed["bfloat16"] < speed["float32"]:
        entry("", "float32 is the faster one here: set model.dtype: float32")
    sizes = [f"{translated(what)} {translated(f'up to {size:.1f}B')}" for what, size in found["fits_billions"].items()]
    entry("fits", ", ".join(sizes))
    entry("", "(a rule of thumb in parameters, at short lengths and small batches)")
    entry("disk", f"{found['disk_free_gb']:.0f} GB free here")
    entry("built-in bases", ", ".join(found["builtin_bases"]))
    for module, what in found["missing"].items():
        entry("missing", f"{module}: {translated(what)}")


def entry(name: str, text: str) -> None:
    """What it is about in a column of its own."""
    say(f"{padded(translated(name), 14)} {translated(text)}")
