"""`ft doctor`: what is installed, what the machine can do, and what `auto` will mean on it."""

from __future__ import annotations

import importlib.util
import shutil

import torch

from finetune.models import hardware, loading
from finetune.recipe import compute_dtype
from finetune.run import versions

# module -> what is missing without it
EXTRAS = {
    "flash_attn": "model.attn_implementation: flash_attention_2 on CUDA GPUs",
    "bitsandbytes": "8-bit optimizers",
    "modelscope": "models from ModelScope",
}


def run() -> None:
    machine = hardware.detect()
    for name, version in versions().items():
        print(f"{name:14} {version}")
    name = torch.cuda.get_device_name() if machine.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{'device':14} {machine.device} ({name}), {machine.memory_gb:.0f} GB")
    why = "native bfloat16" if machine.bf16 else "no native bfloat16"
    print(f"{'precision':14} auto = {compute_dtype('auto', machine)} ({why}); trainable weights float32")
    print(f"{'disk':14} {shutil.disk_usage('.').free / 1e9:.0f} GB free here")
    print(f"{'built-in bases':14} {', '.join(loading.builtin_names())}")
    for module, what in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{'missing':14} {module}: {what}")
