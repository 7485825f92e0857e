"""What this machine can do."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from finetune import ranks
from finetune.recipe.resolve import Hardware

GB = 1e9


def detect() -> Hardware:
    """The accelerator in use, whether it multiplies bfloat16 natively, and its memory."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # is_bf16_supported() also says yes where it is emulated (T4, V100), which is slower than fp32.
        native = torch.version.hip is not None or properties.major >= 8
        return Hardware("cuda", native, properties.total_memory / GB, ranks.count())
    if torch.backends.mps.is_available():
        return Hardware("mps", False, torch.mps.recommended_max_memory() / GB)
    import psutil

    memory = psutil.virtual_memory().total / GB / ranks.on_this_machine()
    return Hardware("cpu", cpu_has_bf16(), memory, ranks.count())


def described() -> dict[str, Any]:
    """The machine in a run's record; nothing that names it."""
    import platform

    found = detect()
    name = torch.cuda.get_device_name() if found.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": found.device, "name": name, "memory_gb": round(found.memory_gb, 1), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "system": platform.system(),
    }  # fmt: skip


def cpu_has_bf16() -> bool:
    """AVX512-BF16 or AMX on x86, BF16 on Arm; elsewhere bfloat16 is emulated and slow."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def rounding() -> dict[str, str]:
    """What the last bits of a result depend on beside recipe and data: another value may round otherwise."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device()).name
    else:
        device = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {_cpu_name()}"
    found = {"device": device, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    return {**found, "processes": str(ranks.count()), "launch": ranks.kind()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def peak_memory_gb() -> float:
    """Peak of this process so far: allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GB
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GB


def input_device(model: torch.nn.Module) -> torch.device:
    """Where token ids go. `model.device` is meta when the first layer's weights lie on disk."""
    device: torch.device = next(model.parameters()).device
    if device.type != "meta":
        return device
    places = (getattr(model, "hf_device_map", None) or {}).values()
    return torch.device(next((place for place in places if isinstance(place, int)), "cpu"))


def cores_allowed() -> int:
    """Of this process: by affinity and by a container's share of processor time."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    share = quota()
    return count if share is None else max(1, min(count, math.ceil(share)))


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that the container may take, or the groups that this process is in; None without a
    limit. Of cgroups, version 2 and 1.

    Args:
        own: lines "number:controllers:group"; version 2 is the one without controllers.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    folders = [root, root / "cpu"]
    for _, kinds, group in (line for line in lines if len(line) == 3 and ".." not in line[2]):
        if not kinds or "cpu" in kinds.split(","):
            top = root / "cpu" if kinds else root
            below = Path(group.strip("/"))
            folders += [top / below, *(top / part for part in below.parents)]
    found = [share for folder in folders if (share := quota_of(folder)) is not None]
    return min(found, default=None)


def quota_of(folder: Path) -> float | None:
    """Of one group."""
    try:
        found = folder / "cpu.max"
        words = found.read_text().split() if found.exists() else [
            (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
        ]  # fmt: skip
        most, period = (float(word) for word in words)
    except (OSError, ValueError):  # "max"
        return None
    return most / period if most > 0 and period > 0 else None
