"""`ft doctor`: what is installed, what the machine can do, and what `auto` will mean on it."""

from __future__ import annotations

import importlib.util
import shutil
import time

import torch

from finetune.models import hardware, sources
from finetune.recipe.resolve import compute_dtype
from finetune.run.directory import versions

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


def run() -> None:
    machine = hardware.detect()
    for name, version in versions().items():
        print(f"{name:14} {version}")
    name = torch.cuda.get_device_name() if machine.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{'device':14} {machine.device} ({name}), {machine.memory_gb:.0f} GB")
    why = "native bfloat16" if machine.bf16 else "no native bfloat16"
    print(f"{'precision':14} auto = {compute_dtype('auto', machine)} ({why}); trainable weights float32")
    speed = {kind: matrix_products(machine.device, kind) for kind in ("float32", "bfloat16")}
    print(f"{'speed':14} " + ", ".join(f"{kind} {value:,.0f} GFLOP/s" for kind, value in speed.items()))
    if machine.device == "cpu" and machine.bf16 and speed["bfloat16"] < speed["float32"]:
        print(f"{'':14} float32 is the faster one here: set model.dtype: float32")
    print(f"{'fits':14} " + ", ".join(f"{what} up to {size:.1f}B" for what, size in fitting(machine.memory_gb).items()))
    print(f"{'':14} (a rule of thumb in parameters, at short lengths and small batches)")
    print(f"{'disk':14} {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
    print(f"{'built-in bases':14} {', '.join(sources.builtin_names())}")
    for module, what in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{'missing':14} {module}: {what}")
