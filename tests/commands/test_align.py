"""What `make align` must show, on each built-in base: about half an hour a base on two cores, three seeds on the first.

Last results stand in the README, under "Alignment".
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.run.directory import read_recipe

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
SEEDS = {"tiny-llama": 3, "tiny-qwen": 1, "tiny-chatglm3": 1}
TRUTHFUL = """
def truthful(prompts, completions, reference, **columns):
    return [1.0 if reply == right else -1.0 for reply, right in zip(completions, reference)]
"""


def metrics(path: Path) -> list[dict[str, Any]]:
    return [run["metrics"] for run in json.loads(path.read_text("utf-8"))["runs"]]


@pytest.mark.parametrize("model", SEEDS)
def test_alignment(tmp_path: Path, model: str) -> None:
    made = tmp_path / "align"
    command = [sys.executable, str(BENCHMARKS / "align.py"), "--model", model, "--output", str(made)]
    subprocess.run([*command, "--ppo-seeds", str(SEEDS[model])], check=True, cwd=tmp_path)

    _, sft, dpo, *ppo = metrics(made / "eval.json")
    right, says_so = "exact_match/answerable", "exact_match/unanswerable"
    assert sft[right] > 0.9
    assert sft[says_so] < 0.25, "the SFT model mostly invents"
    sampled = [metrics(path)[0][says_so] for path in made.glob("sampled-*.json")]
    assert len(sampled) == 3
    assert 0.05 <= sum(sampled) / 3 <= 0.25
    assert dpo[says_so] >= 0.90
    assert dpo[right] >= sft[right] - 0.03
    judged = metrics(made / "reward.json")[0]
    assert judged["preference_accuracy/answerable"] >= 0.90, "or else it pays to say so always"
    assert judged["preference_accuracy/unanswerable"] >= 0.90
    assert len(ppo) == SEEDS[model]
    for seed, found in enumerate(ppo):
        aligned(made / f"ppo-{seed}")
        assert found[says_so] >= 0.75
        assert found[right] >= sft[right] - 0.05


def aligned(run: Path) -> None:
    """The held-out reward is clearly up, and the policy as near to its reference as it was told to be."""
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert result["eval"]["reward_difference_ci"][0] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    kl = [row["kl"] for row in rows[-4:]]  # the estimator's tail is heavy: one rollout says little
    recipe = read_recipe(run)
    assert recipe is not None
    assert 0 < sum(kl) / len(kl) < recipe["ppo"]["kl_target"]


def test_a_rule_pays(tmp_path: Path) -> None:
    """Ten lines of Python instead of a reward model."""
    (tmp_path / "truthful.py").write_text(TRUTHFUL, encoding="utf-8")

    def ft(*arguments: Any) -> None:
        subprocess.run([sys.executable, "-m", "finetune", *map(str, arguments)], check=True, cwd=tmp_path)

    ft("sft", "--recipe", "align_sft.yaml", "--output", "sft")
    rule = ("--set", "reward.model=null", "--set", "reward.functions=[truthful.py:truthful]")
    ft("ppo", "--recipe", "align_ppo.yaml", "--set", "model.adapter=sft", *rule, "--output", "rule")
    ft("eval", "sft", "rule", "--json", "eval.json")
    aligned(tmp_path / "rule")
    sft, found = metrics(tmp_path / "eval.json")
    assert found["exact_match/unanswerable"] >= 0.75
    assert found["exact_match/answerable"] >= sft["exact_match/answerable"] - 0.05
