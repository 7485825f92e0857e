"""A recipe to break, for the tests of reading, overriding and checking."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.recipe import file
from finetune.recipe.stages import SftRecipe

GOOD = """\
version: 1
stage: sft
model: {name: tiny-llama}
data: {train: builtin:tickets/train}
output: {dir: runs/x}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> SftRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return file.load(str(path), SftRecipe, overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return "\n".join(caught.value.lines())
