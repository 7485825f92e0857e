"""What the GPU checks share: `ft` in a process of its own, and what a run has written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


def ft(*words: Any) -> str:
    """What `ft words…` printed on stdout; RuntimeError with its last lines when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-2:]))
    return done.stdout


def metrics(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
