"""Family x quantization x every step, on the built-in bases; writes its table into docs/quantization.md.

Slow: nine trainings of the quickstart task, about 40 minutes on 2 cores. Its last result is the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ft_process, tensors

DOC = Path(__file__).parent.parent.parent / "docs" / "quantization.md"
FAMILIES = ("tiny-llama", "tiny-qwen", "tiny-chatglm3")
KINDS = ("none", "int8", "int4")
HEADS = (
    "base",
    "kind",
    "falls",
    "eval",
    "exact match [95%]",
    "resume",
    "merge original",
    "gap",
    "merge dequantized",
    "gap",
)


def run(*arguments: Any, cwd: Path) -> None:
    done = ft_process(*arguments, cwd=cwd, timeout=3600)
    assert done.returncode == 0, done.stderr


def one(folder: Path, base: str, kind: str) -> dict[str, Any]:
    """Train with evaluation in between, resume, evaluate, merge both ways."""
    settings = [f"model.name={base}", "data.eval_split=100", "train.eval_steps=100", "train.save_steps=100"]
    if kind != "none":
        settings.append(f"model.quantization={kind}")
    arguments = [item for setting in settings for item in ("--set", setting)]
    run("sft", "--recipe", "quickstart", "--output", "run", *arguments, cwd=folder)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    run("eval", "run", "--json", "eval.json", cwd=folder)
    metrics = json.loads((folder / "eval.json").read_text())["runs"][0]["metrics"]
    merges = {}
    for choice in ("original",) if kind == "none" else ("original", "dequantized"):
        run("merge", "--adapter", "run", "--output", choice, "--base", choice, "--dtype", "float32", cwd=folder)
        merges[choice] = json.loads((folder / choice / "merge.json").read_text())
    whole = tensors(folder / "run" / "adapter")
    (folder / "run" / "result.json").unlink()
    checkpoints = sorted((folder / "run" / "checkpoints").glob("*/complete"), key=lambda p: int(p.parent.name[11:]))
    checkpoints[-1].unlink()
    run("sft", "--recipe", "run/recipe.yaml", "--resume", cwd=folder)
    resumed = tensors(folder / "run" / "adapter")
    return {
        "falls": (losses[0], losses[-1]),
        "eval": (held_out[0], held_out[-1]),
        "exact_match": metrics["exact_match"],
        "ci": metrics["exact_match_ci"],
        "resume": max((resumed[k] - whole[k]).abs().max().item() for k in whole),
        "merges": merges,
    }


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize("base", FAMILIES)
def test_every_kind(tmp_path: Path, base: str) -> None:
    found = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        found[kind] = one(tmp_path / kind, base, kind)
    write_rows(base, [line(base, kind, cells) for kind, cells in found.items()])
    for cells in found.values():
        assert cells["falls"][1] < 0.5 * cells["falls"][0]
        assert cells["eval"][1] < cells["eval"][0]
        assert cells["resume"] == 0
    for kind in ("int8", "int4"):
        assert found[kind]["exact_match"] > found["none"]["exact_match"] - 0.03


def line(base: str, kind: str, found: dict[str, Any]) -> str:
    merges = []
    for choice in ("original", "dequantized"):
        report = found["merges"].get(choice)
        merges.append(f"{report['max_logit_diff']:.2g}" if report else "not quantized")
        gap = (report or {}).get("diff_to_trained_model")
        merges.append("–" if gap is None else f"{gap:.2g}")
    cells = [
        base, kind, "{:.3f} → {:.3f}".format(*found["falls"]), "{:.3f} → {:.3f}".format(*found["eval"]),
        f"{found['exact_match']:.3f} [{found['ci'][0]:.3f}, {found['ci'][1]:.3f}]", f"{found['resume']:g}", *merges,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def write_rows(base: str, rows: list[str]) -> None:
    """Into the table of the document; the rows of the other bases stay."""
    text = DOC.read_text(encoding="utf-8")
    table = re.search(r"<!-- table -->\n(.*)<!-- /table -->", text, flags=re.S)
    assert table is not None
    others = [old for old in table[1].splitlines()[2:] if not old.startswith(f"| {base} ")]
    every = sorted([*others, *rows], key=lambda row: FAMILIES.index(row.split()[1]))
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *every]
    DOC.write_text(text[: table.start(1)] + "\n".join(lines) + "\n" + text[table.end(1) :], encoding="utf-8")
