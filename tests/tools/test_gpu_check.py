"""The check of a GPU: whatever happens to one part is one row."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))  # as where a script lies
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "result", "figures"),
    [
        ('print("noise"); print(\'{"result": "passed", "figures": "1 tok/s"}\')', "passed", "1 tok/s"),
        ("import os; os.kill(os.getpid(), 9)", "FAILED", "ended with -9: "),
        ("raise SystemExit('no kernel image')", "FAILED", "ended with 1: no kernel image"),
        ("import time; time.sleep(60)", "FAILED", "not done in 1 s"),
    ],
)
def test_every_failure_is_a_row(check: ModuleType, code: str, result: str, figures: str) -> None:
    row = check.apart_from_us([sys.executable, "-c", code], 1.0)
    assert (row["result"], row["figures"]) == (result, figures)


def test_an_error_of_a_check_is_a_row(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(check: object) -> dict[str, str]:
        raise RuntimeError("gradients are off")

    monkeypatch.setitem(check.ALL, "kernels", broken)
    assert check.one("kernels", tmp_path, "tiny") == {"result": "FAILED", "figures": "RuntimeError: gradients are off"}


def test_without_a_gpu_it_says_not_run(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "gpu.md"
    monkeypatch.setattr(check, "machine", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(page)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert not ended.value.code
    text = page.read_text()
    assert "Not run on hardware" in text
    assert text.count("| not run | no GPU |") == len(check.ALL)
    assert capsys.readouterr().out.count("not run") == len(check.ALL)
    assert text.index("## Speed and memory") < text.index("| sft_bf16 |")


def test_the_page_is_the_one_that_it_writes(check: ModuleType) -> None:
    """Until it has run on hardware."""
    kept = (FILE.parents[1] / "docs" / "gpu.md").read_text()
    rows = {name: {"result": "not run", "figures": "no GPU"} for name in check.ALL}
    assert "Not run on hardware" not in kept or kept == check.page(rows, None, "tiny")
