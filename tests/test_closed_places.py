"""Files and folders that may not be read or written, each with what is said of it: exit code 2, no traceback.

Root may read everything, unless it gives that up: the process that is looked at starts without CAP_DAC_OVERRIDE and
CAP_DAC_READ_SEARCH.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bad_inputs_kit as kit
import pytest

TABLE = Path(__file__).parent / "fixtures" / "closed_places.txt"
BLOCKS = [block.strip("\n").partition("\n") for block in TABLE.read_text(encoding="utf-8").split("\n\n")]
CASES = {line.removeprefix("$ ft "): said for line, _, said in BLOCKS}
PR_CAPBSET_DROP, CAPABILITIES = 24, (1, 2)
RESULT = {"stage": "sft", "versions": {"ft": "0"}}
CLOSED = {
    "closed.yaml": kit.GOOD, "closed.jsonl": kit.ROW, "models/closed/config.json": {"model_type": "llama"},
    "adapters/closed/adapter_config.json": kit.LORA, "runs/closed/recipe.yaml": kit.GOOD, "closed.jinja": "x",
}  # fmt: skip
OPEN = {
    "mine.yaml": kit.GOOD, "rows.jsonl": kit.ROW, "runs/closed/result.json": RESULT,
    "llamafactory.yaml": kit.LLAMA_FACTORY,
    "runs/locked/recipe.yaml": kit.GOOD, "runs/locked/result.json": RESULT, "shut/rows.jsonl": kit.ROW,
    "shut/recipe.yaml": kit.GOOD, "runs/near/adapter/adapter_config.json": kit.LORA, "readonly/x": "",
}  # fmt: skip
FOLDERS = {"shut": 0, "runs/locked": 0, "readonly": 0o555}


def as_others() -> None:
    """Before exec: as whoever is not root."""
    if os.geteuid() == 0:
        for capability in CAPABILITIES:
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def kept_out(folder: Path) -> bool:
    """Whether the process is refused what it should be: not on systems without capabilities."""
    look = [sys.executable, "-c", f"import os; raise SystemExit(os.access({str(folder / 'closed.yaml')!r}, os.R_OK))"]
    return subprocess.run(look, preexec_fn=as_others).returncode == 0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    where = tmp_path_factory.mktemp("closed") / "here"
    where.mkdir()
    for name, content in {**OPEN, **CLOSED}.items():
        kit.write(where, name, content)
    for name, mode in {**dict.fromkeys(CLOSED, 0), **FOLDERS}.items():
        (where / name).chmod(mode)
    if sys.platform != "linux" or not kept_out(where):
        pytest.skip("whoever runs this may read everything, and cannot give that up")
    yield where
    for name in FOLDERS:
        (where / name).chmod(0o755)  # or nobody could take it away


@pytest.fixture(scope="module")
def told(here: Path) -> dict[str, kit.Told]:
    return kit.typed(here, CASES, begin=as_others)


@pytest.mark.parametrize("line", CASES)
def test_told(told: dict[str, kit.Told], here: Path, line: str) -> None:
    code, heavy, text = told[line]
    assert kit.as_table(text, here) == CASES[line]
    assert (code, heavy) == (2, [])
