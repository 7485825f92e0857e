"""Networks of which two processes hold half of every layer have the loss and the gradients of the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.models.tensor_parallel import COMPARED

SCRIPT = Path(__file__).parent / "tensor_parallel_script.py"


def found(folder: Path, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), str(folder), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return read


def check(kinds: dict[str, dict[str, Any]]) -> None:
    for kind, methods in kinds.items():
        for method, apart in methods.items():
            if isinstance(apart, str):  # norms that are summed wrongly
                assert (method, "gradients of" in apart) == ("full", True), (kind, apart)
            else:
                assert apart["loss"] < 1e-5, (kind, method, apart)
                assert apart["gradients"] < 1e-4, (kind, method, apart)


@pytest.mark.slow
def test_every_type_that_is_said_to_be_compared(tmp_path: Path) -> None:
    check(found(tmp_path, COMPARED))
