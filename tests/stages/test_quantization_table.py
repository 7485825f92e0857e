"""Family x quantization x every step, on the built-in bases; writes its table into docs/quantization.md.

Slow: nine trainings of the quickstart task, about 40 minutes on 2 cores. Its last result is the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ft, tensors

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
    done = ft(*arguments, cwd=cwd)
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
@pytest.mark.timeout(4 * 3600)
def test_every_family_and_kind(tmp_path: Path) -> None:
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    scores: dict[tuple[str, str], float] = {}
    for base in FAMILIES:
        for kind in KINDS:
            folder = tmp_path / f"{base}-{kind}"
            folder.mkdir()
            found = one(folder, base, kind)
            scores[base, kind] = found["exact_match"]
            assert found["falls"][1] < 0.5 * found["falls"][0]
            assert found["eval"][1] < found["eval"][0]
            assert found["resume"] == 0
            merges = []
            for choice in ("original", "dequantized"):
                report = found["merges"].get(choice)
                merges.append(f"{report['max_logit_diff']:.2g}" if report else "not quantized")
                gap = (report or {}).get("diff_to_trained_model")
                merges.append("–" if gap is None else f"{gap:.2g}")
            cells = [
                base, kind, "{:.3f} → {:.3f}".format(*found["falls"]), "{:.3f} → {:.3f}".format(*found["eval"]),
                f"{found['exact_match']:.3f} [{found['ci'][0]:.3f}, {found['ci'][1]:.3f}]", f"{found['resume']:g}",
                *merges,
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    text = DOC.read_text(encoding="utf-8")
    table = "\n".join(lines)
    DOC.write_text(
        re.sub(r"(<!-- table -->).*(<!-- /table -->)", rf"\1\n{table}\n\2", text, flags=re.S), encoding="utf-8"
    )
    for base in FAMILIES:
        for kind in ("int8", "int4"):
            assert scores[base, kind] > scores[base, "none"] - 0.03
