"""docs/data.md and data_templates/README.md say what the code does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from finetune.recipe.sections import DataConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import data_tables


@pytest.mark.parametrize(("path", "folder"), data_tables.files().items(), ids=lambda value: Path(value).name)
def test_tables_are_current(path: Path, folder: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == data_tables.renewed(text, folder), "run: python tools/data_tables.py"
    assert "<!-- table:" in text


@pytest.mark.parametrize("path", data_tables.files(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_every_key_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
