"""docs/data.md and data_templates/README.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.data import reference
from finetune.recipe.sections import DataConfig


@pytest.mark.parametrize(("path", "folder"), reference.files().items(), ids=lambda value: Path(value).name)
def test_tables_are_current(path: Path, folder: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == reference.renewed(text, folder), "run: python -m finetune.data.reference"
    assert "<!-- table:" in text


@pytest.mark.parametrize("path", reference.files(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_every_key_is_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
