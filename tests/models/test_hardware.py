"""What the machine is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from finetune.models import hardware
if sys.argv[1] == "kept":
    hardware.keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(64 << 20)
before = faults()
for _ in range(4):
    bytearray(64 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switch")
def test_freed_memory_is_used_again() -> None:
    """64 MB are 16,384 pages; mapped anew, each of them is a page fault, four times."""
    found = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "not")
    }
    assert found["kept"] < 1000
    assert found["not"] > found["kept"]
