"""Every type that transformers continues text with, shrunk and put through family_checks: what is found is what stands
in finetune/families_tested.json, of which docs/models.md is made.

All of them take about ten minutes on one core (`make slow`); here a handful of those that differ most.
"""

from __future__ import annotations

import re
from pathlib import Path

import family_checks
import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune import families

HANDFUL = ("qwen3_5_text", "gpt_oss", "deepseek_v3")


def without_numbers(found: dict[str, str]) -> dict[str, str]:
    """How much is rounded depends on the machine."""
    return {check: re.sub(r"[-\d.e]*\d", "#", said) for check, said in found.items()}


def compare(kind: str, folder: Path) -> None:
    found = family_checks.outcome(kind, folder)
    again = f"if that is meant: python tests/models/family_checks.py {kind}"
    assert without_numbers(found) == without_numbers(families.types_tested()[kind]), again


@pytest.mark.parametrize("kind", HANDFUL)
def test_a_handful(kind: str, tmp_path: Path) -> None:
    compare(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_type(kind: str, tmp_path: Path) -> None:
    """What was found last stands in finetune/families_tested.json."""
    compare(kind, tmp_path)


def test_the_record_is_of_this_transformers() -> None:
    assert families.types_tested().keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert families.record()["versions"]["transformers"] == transformers.__version__


def test_families_that_people_ask_for_can_be_fine_tuned() -> None:
    asked = [kind for kind, row in families.FAMILIES.items() if row.tested == "shrunk"]
    assert len(asked) > 20
    for kind in asked:
        assert families.verdict(families.types_tested()[kind]) != "cannot", kind
