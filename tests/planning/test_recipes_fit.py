"""The first line of a shipped recipe names the card that it is for: by `ft plan` it fits there, rows of full length."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.commands.plan import planned
from finetune.planning import fits
from finetune.planning.memory import estimate
from finetune.planning.source import skeleton
from finetune.recipe.file import load
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import RECIPES

pytestmark = [pytest.mark.whole, pytest.mark.slow]
FOLDER = Path(__file__).parents[2] / "recipes"
FIRST = re.compile(r"# ft (\w+) --recipe (\S+) .*?one (\d+) GB GPU")
FURTHER = re.compile(r"; (\d+) GB with model\.quantization: (\w+)")


def claims() -> list[tuple[str, str, int, str | None]]:
    """(recipe, stage, GB, quantization where it is another)."""
    found: list[tuple[str, str, int, str | None]] = []
    for path in sorted(FOLDER.glob("*.yaml")):
        line = path.read_text(encoding="utf-8").splitlines()[0]
        if (first := FIRST.match(line)) is None:
            continue
        found.append((path.name, first[1], int(first[3]), None))
        found += [(path.name, first[1], int(size), kind) for size, kind in FURTHER.findall(line)]
    return found


@pytest.mark.parametrize(("name", "stage", "size", "quantization"), claims())
def test_it_fits_the_card_that_it_names(name: str, stage: str, size: int, quantization: str | None) -> None:
    raw = load(str(FOLDER / name), RECIPES[stage])
    if quantization is not None:
        kind = None if quantization == "null" else quantization
        raw = raw.model_copy(update={"model": raw.model.model_copy(update={"quantization": kind})})
    machine = Hardware("cuda", "T4" not in name.upper(), size)
    recipe, network, _ = planned(raw, skeleton(raw.model), machine)
    rows, length = recipe.train.per_device_train_batch_size or 1, fits.length_of(recipe)
    found = estimate(network, recipe, rows, length, "cuda", fits.accumulation(recipe))
    assert found.peak <= fits.budget(machine)
