"""What the GPU checks share: `ft` as they run it, and what a run has written."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]


def ft(*words: Any) -> str:
    """What `ft words…` printed on stdout, in this process, which imports everything once; RuntimeError with its last
    lines when it fails."""
    import torch

    from finetune.cli import main

    before, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = ["ft", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = int(str(ended.code or 0))
    finally:
        sys.argv = before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if code:
        raise RuntimeError(" ".join(err.getvalue().strip().splitlines()[-2:]))
    return out.getvalue()


def ft_apart(*words: Any) -> str:
    """The same in a process of its own."""
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
