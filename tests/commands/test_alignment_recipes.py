"""The shipped recipes of dpo, kto, reward and ppo on the built-in base of their family, by the command a user types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SHARED, ft
from rl_kit import here

from finetune import child
from finetune.models import sources

REAL = SHARED / "data" / "dpo_zh_demo.json"
FAMILIES = [
    pytest.param(
        name, marks=pytest.mark.skipif(f"tiny-{name}" not in sources.builtin_names(), reason=f"needs tiny-{name}")
    )
    for name in ("llama", "qwen", "chatglm3")
]
TWO_STEPS = ["train.max_steps=2", "train.warmup_steps=0", "train.effective_batch_size=4"]
SHORT = {
    **dict.fromkeys(("dpo", "kto", "reward"), TWO_STEPS),
    "ppo": [
        "train.max_steps=1", "train.effective_batch_size=8", "ppo.max_new_tokens=8", "ppo.num_mini_batches=2",
        "reward.train={path: builtin:tickets/pairs_train, max_samples: 48}",
    ],
}  # fmt: skip


def run(folder: Path, stage: str, family: str, *settings: str) -> Path:
    every = [f"model.name=tiny-{family}", "data.max_samples=16", "eval.limit=4", "train.logging_steps=1"]
    arguments = [item for setting in (*every, *SHORT[stage], *settings) for item in ("--set", setting)]
    done = ft(stage, "--recipe", f"{stage}_{family}", *arguments, "--output", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(
    "family", [pytest.param(*FAMILIES[0].values, marks=[*FAMILIES[0].marks, pytest.mark.whole]), *FAMILIES[1:]]
)
@pytest.mark.parametrize("stage", SHORT)
def test_trains(tmp_path: Path, stage: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's trains its reward model first (test_ppo.py does so in a process of its own, as it is)."""
    monkeypatch.setattr(child, "run", here)
    found = run(tmp_path, stage, family)
    result = json.loads((found / "result.json").read_text())
    assert result["steps"] == (1 if stage == "ppo" else 2)
    assert (found / "reward" / "result.json").exists() == (stage == "ppo")
    assert (found / "adapter" / "adapter_model.safetensors").exists()
    assert result["trained"]["changed_equals_declared"], "every weight that should learn has moved"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the real preference file")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_ppo_on_a_real_file_and_a_quantized_base(tmp_path: Path, kind: str, family: str) -> None:
    # A tiny tokenizer makes several tokens of a rare character.
    real = [
        "data.on_overlong=drop",
        f"data.train={REAL}",
        f"reward.train={REAL}",
        "eval.data=null",
        "reward.num_train_epochs=1",
    ]
    found = run(tmp_path, "ppo", family, f"model.quantization={kind}", *real)
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["first_log_ratio"] < 0.02
    assert rows[-1]["response_length"] > 0
    assert json.loads((found / "result.json").read_text())["trained"]["changed_equals_declared"]
