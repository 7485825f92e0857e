"""The published SmolLM2 file: GGUF -> trained a few steps -> merged -> GGUF, and what llama.cpp answers.

Last result (one shared core, 90 s): 4 of 4 greedy answers alike, largest logit difference 0.399 with bf16 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ft, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import UserError
from finetune.models.gguf import packaged

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")

QUESTIONS = ["What is the capital of France?", "Count from 1 to 5.", "Name a colour.", "What is 2 + 2?"]


@pytest.mark.slow
def test_smollm2_there_and_back(tmp_path: Path, recipe: Any) -> None:
    try:
        packaged.file("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))
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
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert other.tokenize(prompt.encode(), add_bos=True, special=True) == ids
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
            answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
        other.reset()
        other.eval(ids)
        largest = max(largest, float((ours - torch.tensor(np.array(other.scores[: len(ids)]))).abs().max()))
        said = other.create_completion(ids, max_tokens=16, temperature=0)["choices"][0]["text"]
        alike += said == tokenizer.decode(answer, skip_special_tokens=True)
    print(f"largest logit difference {largest:.3g}; {alike} of {len(QUESTIONS)} greedy answers alike")
    assert alike == len(QUESTIONS)
    assert largest < 1.0
