"""The notebook runs from its first cell to its last, with few steps and rows. `make notebook` runs this one."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import sysconfig
from pathlib import Path

import pytest
from test_docs import parsed

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def sources() -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]]


def test_its_commands_are_those_of_the_program() -> None:
    lines = [found for text in sources() for found in re.findall(r"(?:^|\| )(ft [a-z][^|>#\n]*)", text, re.MULTILINE)]
    assert len(lines) > 8
    for line in lines:
        parsed(shlex.split(re.sub(r"\$\w+", "", line))[1:])


def test_nothing_that_it_printed_is_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About a minute on one core: five commands that import torch."""
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[notebook]'")
    pytest.importorskip("ipykernel", reason="pip install '.[notebook]'")
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "ft").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m finetune "$@"\n')
    (scripts / "ft").chmod(0o755)
    monkeypatch.setenv("PATH", f"{scripts}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TRAIN", "--set train.max_steps=2 --set train.effective_batch_size=4")
    monkeypatch.setenv("EVAL", "--limit 4")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", cwd=tmp_path)
    client.execute()
    said = ["".join(o.get("text", "") for o in cell.get("outputs", [])) for cell in notebook.cells]
    assert any("exact match" in text for text in said)
    assert (tmp_path / "merged" / "config.json").exists()
    assert (tmp_path / "report.html").exists()
