"""Killed at renames, fsyncs and random moments, a command goes on to what it would have been: see kill_drill."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).with_name("kill_drill.py")
ALL = ("sft", "dpo", "ppo", "sft --overwrite", "sft, more steps", "merge", "merge --overwrite", "eval", "generate")


def drilled(base: Path, folder: Path, *options: object) -> list[dict[str, object]]:
    command = [sys.executable, str(DRILL), str(folder), "--base", str(base), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    problems = [problem for drill in found for problem in drill["problems"]]
    assert not problems, done.stdout
    assert done.returncode == 0, done.stderr[-2000:]
    return found


def test_a_few_kills_of_every_kind(base: Path, tmp_path: Path) -> None:
    """Other places every time; the seed is printed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    found = drilled(base, tmp_path, "--points", 1, "--random", 1, "--seed", seed)
    assert tuple(one["drill"] for one in found) == ALL
    assert all(one["operations"] for one in found)


@pytest.mark.slow
def test_every_kill(base: Path, tmp_path: Path) -> None:
    """Before and after each operation, and 30 random moments of each command; the last result: docs/reliability.md."""
    found = drilled(base, tmp_path, "--random", 30, "--seed", os.environ.get("FT_SEED", "1"))
    assert tuple(one["drill"] for one in found) == ALL
