"""What the terminal shows, also a narrow one."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune import progress


@pytest.mark.parametrize("width", [40, 80, 200])
def test_samples_fit(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """The score, the end of the prompt and the start of the reply are there at any width."""
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, width=width))
    long = "看工单回答。花了616元。客户刘涛。订单里的白色水杯和订单不一样，请尽快处理。" * 3 + "多少钱？"
    progress.samples("step 1", [(long, "not stated " * 20, -12.345), ("a", "b", 1.0)])
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    row = next(line for line in lines if "-12.35" in line)
    assert "多少钱？ │" in row.replace("  │", " │")
    assert "│ not" in row
    assert any("+1.00" in line for line in lines)
