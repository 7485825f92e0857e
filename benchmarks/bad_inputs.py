"""Processor seconds of a wrong command line: of each in tests/fixtures/bad_inputs.txt that needs no torch.

Each is a process of its own, from its start to its end.

    python benchmarks/bad_inputs.py [--first 20]

They are those of user and system, not of a clock: other work on the machine does not count. Exit code 1 when one takes
three or more, or does not end as a bad input does.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import bad_inputs_kit as kit  # noqa: E402

PROMISED = 3.0


def spent() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(line: str, folder: Path) -> tuple[float, int]:
    """(processor seconds, exit code)."""
    command = [sys.executable, "-m", "finetune", *shlex.split(line)]
    before = spent()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | kit.ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True
    )
    return spent() - before, done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, help="only so many")
    given = parser.parse_args()
    lines = [line for line, _ in kit.cases()[0]][: given.first]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "here"
        folder.mkdir()
        kit.folder(folder)
        seconds(lines[0], folder)  # the first reads everything from the disk
        found = {line: seconds(line, folder) for line in lines}
    taken = {line: value for line, (value, _) in found.items()}
    wrong = [f"ft {line}: exit code {code}" for line, (_, code) in found.items() if code != 2]
    worst = max(taken, key=taken.__getitem__)
    print(f"{len(taken)} command lines, CPU-s each: mean {statistics.mean(taken.values()):.2f}, max {taken[worst]:.2f}")
    print(f"the longest: ft {worst}")
    print("\n".join(wrong), end="\n" * bool(wrong))
    return int(bool(wrong) or taken[worst] >= PROMISED)


if __name__ == "__main__":
    sys.exit(main())
