"""Method x base x quantization: trains, reloads, switches off, generates, resumes, merges or says why not.

Here: every method on Llama, and those with places of their own on Qwen2 and ChatGLM3. The whole matrix is slow
(`make slow`) and writes its table into docs/methods.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cells import VARIANTS, Cell, complaints, make_base, run
from conftest import train

Recipe = Callable[..., Path]

FAMILIES = ("llama", "qwen2", "chatglm3")
DOCS = Path(__file__).parent.parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"

# What only whole runs show: resuming, optimizer groups, batched generation, quantized bases, ChatGLM's own layout.
SMALL = [
    *((variant, "llama", None) for variant in (
        "lora+", "pissa", "adalora", "prompt_tuning", "p_tuning MLP", "prefix_tuning v2", "bitfit", "full")),
    *((variant, "chatglm3", None) for variant in ("bottleneck houlsby", "prefix_tuning", "last_layers head")),
    *((variant, "llama", "int4") for variant in ("loftq", "bitfit", "last_layers", "prefix_tuning")),
]  # fmt: skip
REFUSED = {
    ("loha", "int4"), ("loha", "int8"), ("lokr", "int4"), ("lokr", "int8"), ("pissa", "int4"), ("pissa", "int8"),
    ("olora", "int4"), ("olora", "int8"), ("dora, rslora", "int8"),
    ("full", "int4"), ("full", "int8"), ("loftq", None), ("loftq", "int8"),
}  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def check(
    variant: str, family: str, quantization: str | None, bases: Path, tmp_path: Path, patch: pytest.MonkeyPatch
) -> Cell:
    base = make_base(family, bases)
    cell = run(variant, base, quantization, tmp_path, patch)
    if (variant, quantization) in REFUSED or (variant, family) == ("loftq", "chatglm3"):
        assert cell.refused is not None
    else:
        assert cell.refused is None
        assert complaints(variant, cell) == []
    return cell


@pytest.mark.parametrize(("variant", "family", "quantization"), SMALL)
def test_cell(
    variant: str, family: str, quantization: str | None, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(variant, family, quantization, bases, tmp_path, monkeypatch)


@pytest.mark.parametrize("variant", ["p_tuning MLP", "prefix_tuning v2", "bottleneck houlsby"])
def test_continue_from_an_adapter(variant: str, recipe: Recipe, tmp_path: Path) -> None:
    """A second run starts where the first one ended, also where the network that made the prompt is gone."""
    section, rate = VARIANTS[variant]
    path = recipe(train={"max_steps": 6, "learning_rate": rate, "lr_scheduler_type": "constant"})
    values = {**yaml.safe_load(path.read_text()), "adapter": section}
    path.write_text(yaml.safe_dump(values))
    first = [row["loss"] for row in train(path).read_metrics() if "loss" in row]
    values["model"]["adapter"], values["output"]["dir"] = values["output"]["dir"], str(tmp_path / "second")
    path.write_text(yaml.safe_dump(values))
    second = train(path)
    losses = [row["loss"] for row in second.read_metrics() if "loss" in row]
    assert abs(losses[0] - first[-1]) < abs(losses[0] - first[0])
    assert json.loads(second.result.read_text())["trained"]["changed_equals_declared"]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matrix(
    variant: str, family: str, quantization: str | None, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method on three families, in full precision, int8 and int4; a cell of the table in docs/methods.md each."""
    cell = check(variant, family, quantization, bases, tmp_path, monkeypatch)
    write_cell(variant, f"{family} {quantization or ''}".strip(), shown(cell))


def shown(cell: Cell) -> str:
    if cell.refused is not None:
        return "refused"
    merged = "no merge" if cell.merge_diff is None else f"merge {cell.merge_diff:.0e}"
    return f"{cell.losses[0]:.2f} → {cell.losses[-1]:.2f}, {merged}"


def write_cell(variant: str, column: str, text: str) -> None:
    """Replace one cell of the table, which is made when it is not there."""
    head, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
    old, tail = rest.split(END)
    columns = [f"{family} {kind}".strip() for family in FAMILIES for kind in ("", "int8", "int4")]
    table = {name: dict.fromkeys(columns, "") for name in VARIANTS}
    for line in old.strip().splitlines()[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if name in table:
            table[name] = dict(zip(columns, cells, strict=True))
    table[variant][column] = text
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.values())} |" for name, row in table.items()]
    DOCS.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + tail, encoding="utf-8")
