"""`ft models list` and docs/models.md come from the table in families.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import ft

from finetune import families
from finetune.commands import models

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
import families_tiny

ROOT = Path(__file__).parents[2]


def test_docs_are_current() -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == models.document(), "run: ft models list --markdown > docs/models.md"


def test_what_is_called_tested_is_in_the_tests() -> None:
    tested = {kind for kind, _ in families_tiny.NETWORKS.values()}
    assert {kind for kind, row in families.FAMILIES.items() if row.tested in ("random", "base")} == tested


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    models.show()
    shown = capsys.readouterr().out
    for kind, row in families.FAMILIES.items():
        assert kind in shown or not row.tested
    for words in ("nothing ran on a GPU", "GLM-130B", "BERT", "T5", "BlueLM", "Baichuan-13B"):
        assert words in shown


def test_from_the_command_line() -> None:
    result = ft("models", "list", "--markdown")
    assert result.returncode == 0
    assert result.stdout.startswith("# Models")
