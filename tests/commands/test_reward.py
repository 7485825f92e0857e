"""`ft reward`: trl's own numbers, scores that any tool reads, every kind of adapter and base, exact resume."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, tensors, train
from rl_kit import logged, pairs, result, reward_recipe, run_reward

from finetune.errors import UserError
from finetune.evaluation.rewards import RewardModel, score_rows
from finetune.models import hardware
from finetune.recipe.file import load
from finetune.recipe.stages import RewardRecipe
from finetune.training import session
from finetune.training.start import reward_model, seed_everything

WHOLE = {"effective_batch_size": 32, "max_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}


def start(path: Path) -> tuple[Any, Any]:
    """(the model as it is before training, its tokenizer and encoder)."""
    prepared = session.prepare(load(str(path), RewardRecipe), resume=False)
    seed_everything(prepared.recipe)
    return reward_model(prepared.recipe, prepared.base, prepared.machine), prepared.base


def text(i: int, answer: str) -> str:
    return f"<|im_start|>user\nsay {i}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def plain_peft(base: Path, adapter: Path) -> Any:
    """As any tool loads it."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(network, adapter).eval()


def test_losses_equal_those_of_trl(tmp_path: Path, base: Path) -> None:
    """The same pairs through trl's RewardTrainer on transformers' own network, from the same start."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    path = reward_recipe(tmp_path, base, train=WHOLE)
    ours = logged(run_reward(path), "loss")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in pairs(tmp_path).read_text().splitlines()]
    encoded = [
        {f"{n}_ids": tokenizer(text(i, r[n]))["input_ids"] for n in ("chosen", "rejected")} for i, r in enumerate(rows)
    ]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1),
        args=RewardConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=32, max_steps=3, learning_rate=5e-3,
            lr_scheduler_type="constant", logging_steps=1, bf16=False, use_cpu=True, report_to="none", max_length=64,
            activation_checkpointing=False, save_strategy="no", disable_tqdm=True, weight_decay=0.0,
            center_rewards_coefficient=0.01,
        ),
        train_dataset=Dataset.from_list(encoded), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS"),
    )  # fmt: skip
    parameters = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in start(path)[0].named_parameters():
            if value.requires_grad:
                parameters[name].copy_(value)
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[-1] < ours[0] - 0.01


@pytest.mark.parametrize(("margin", "center"), [(0.0, None), (0.7, None), (0.0, 0.3), (-0.4, 0.1)])
def test_loss_is_the_formula(tmp_path: Path, base: Path, margin: float, center: float | None) -> None:
    """-log sigmoid(r+ - r- - margin) + center (r+ + r-)^2, in float64 from the scores at the start."""
    objective = {"margin": margin, "center_rewards_coefficient": center}
    path = reward_recipe(tmp_path, base, train={**WHOLE, "max_steps": 1}, reward=objective)
    model, parts = start(path)
    rows = [json.loads(line) for line in pairs(tmp_path).read_text().splitlines()]
    answers = [text(i, row[name]) for name in ("chosen", "rejected") for i, row in enumerate(rows)]
    scores = torch.tensor(score_rows(model, [parts.tokenizer(a)["input_ids"] for a in answers], 0), dtype=torch.float64)
    good, bad = scores.chunk(2)
    losses = torch.log1p(torch.exp(-(good - bad - margin))) + (center or 0.0) * (good + bad) ** 2
    assert logged(run_reward(path), "loss")[0] == pytest.approx(losses.mean().item(), abs=1e-5)


METHODS = [
    {"method": "lora", "r": 4},
    {"method": "prompt_tuning"},
    {"method": "p_tuning"},
    {"method": "prefix_tuning"},
    {"method": "bitfit"},
    {"method": "bottleneck"},
    {"method": "last_layers", "num_layers": 1, "head": True},
]


@pytest.mark.parametrize("adapter", METHODS, ids=lambda a: a["method"])
def test_learns_and_scores_alike_everywhere(tmp_path: Path, base: Path, adapter: dict[str, Any]) -> None:
    """Held-out pairs get it right; plain peft gives the same scores; neither padding nor neighbours change them."""
    rate = 2e-2 if "t_tuning" in adapter["method"] else 5e-3
    path = reward_recipe(
        tmp_path, base, adapter=adapter, data={"eval_split": 8}, train={"max_steps": 24, "learning_rate": rate}
    )
    found = run_reward(path)
    assert result(found)["eval"]["accuracy"] == 1.0
    assert logged(found, "loss")[-1] < 0.69 < logged(found, "loss")[0]

    judge = RewardModel.load(str(found.path), torch.float32, hardware.detect())
    rows = [judge.encoder.tokenizer(text(i, "yes " * (1 + 5 * (i % 3))))["input_ids"] for i in range(6)]
    together = score_rows(judge.model, rows, 0)
    alone = [score_rows(judge.model, [row], 0)[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-5)
    assert score_rows(judge.model, rows, 7) == pytest.approx(alone, abs=1e-5), "whatever the padding"
    theirs = plain_peft(base, found.adapter)
    with torch.no_grad():
        assert [theirs(input_ids=torch.tensor([row])).logits.item() for row in rows] == pytest.approx(alone, abs=1e-5)


def test_pairs_without_padding_have_the_figures_of_padded_rows(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    from finetune.models import documents

    passes, plain = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, **given: passes.append(given) or plain(self, **given))
    settings: dict[str, Any] = {"data": {"eval_split": 6}, "train": {"max_steps": 2}}
    one = run_reward(reward_recipe(tmp_path, base, **settings))
    assert passes
    assert all(given.get("attention_mask") is None and len(given["input_ids"]) == 1 for given in passes)
    monkeypatch.setattr(documents, "use", lambda model: False)
    rows = run_reward(reward_recipe(tmp_path, base, "rows", **settings))
    assert passes[-1]["attention_mask"] is not None
    for key in ("loss", "grad_norm", "eval_loss", "margin", "eval_mean_reward", "num_tokens"):
        assert logged(one, key) == pytest.approx(logged(rows, key), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_on_quantized_bases(tmp_path: Path, base: Path, kind: str) -> None:
    path = reward_recipe(tmp_path, base, model={"quantization": kind}, data={"eval_split": 8}, train={"max_steps": 16})
    found = run_reward(path)
    assert result(found)["eval"]["accuracy"] == 1.0
    assert all(t.dtype == torch.float32 for t in tensors(found.adapter).values())
    judge = RewardModel.load(str(found.path), torch.float32, hardware.detect())
    kinds = {str(p.dtype) for p in judge.model.parameters()}
    assert f"torch.{'int8' if kind == 'int8' else 'uint8'}" in kinds, "scored on the base it was trained on"


def test_full(tmp_path: Path, base: Path) -> None:
    """A stock sequence-classification checkpoint."""
    from transformers import AutoModelForSequenceClassification

    path = reward_recipe(tmp_path, base, adapter={"method": "full"}, train={"learning_rate": 1e-3})
    found = run_reward(path)
    config = json.loads((found.model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    judge = RewardModel.load(str(found.path), torch.float32, hardware.detect())
    rows = [judge.encoder.tokenizer(text(i, "yes " * (i + 1)))["input_ids"] for i in range(4)]
    stock = AutoModelForSequenceClassification.from_pretrained(found.model).eval()
    with torch.no_grad():
        theirs = [stock(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert score_rows(judge.model, rows, 0) == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("adapter", [{"method": "lora", "lora_dropout": 0.1}, {"method": "p_tuning"}])
def test_resume_is_exact(tmp_path: Path, base: Path, adapter: dict[str, Any]) -> None:
    steps = {"max_steps": 8, "save_steps": 4, "save_total_limit": 9}
    path = reward_recipe(tmp_path, base, adapter=adapter, train=steps)
    found = run_reward(path)
    losses, whole = logged(found, "loss"), tensors(found.adapter)
    found.result.unlink()
    (found.checkpoints / "checkpoint-8" / "complete").unlink()
    resumed = run_reward(path, resume=True)
    assert logged(resumed, "loss") == losses
    assert all(torch.equal(t, whole[k]) for k, t in tensors(resumed.adapter).items())


def test_goes_on_from_another_reward_model(tmp_path: Path, base: Path) -> None:
    first = run_reward(reward_recipe(tmp_path, base, train=WHOLE))
    path = reward_recipe(tmp_path, base, "second", train=WHOLE, model={"adapter": str(first.path)})
    model, _ = start(path)
    loaded = plain_peft(base, first.adapter).state_dict()
    for name, value in model.named_parameters():
        if value.requires_grad and ".score." not in name:
            assert torch.equal(value, loaded[name])
    assert logged(run_reward(path), "loss")[0] < logged(first, "loss")[0]


def test_a_run_without_a_score_head_is_no_reward_model(recipe: Callable[..., Path]) -> None:
    sft = train(recipe(train={"max_steps": 1}))
    with pytest.raises(UserError, match="has no score head"):
        RewardModel.load(str(sft.path), torch.float32, hardware.detect())


def test_head_is_on_the_base_it_was_given(tmp_path: Path, base: Path) -> None:
    """Weights are shared with the loaded network, not copied; the caller's config stays."""
    from transformers import AutoModelForCausalLM

    from finetune.models.score_head import with_score_head

    causal = AutoModelForCausalLM.from_pretrained(base)
    before = copy.deepcopy(causal.config.to_dict())
    scored = with_score_head(causal, "base")
    assert scored.model is causal.model
    assert scored.config.num_labels == 1
    assert causal.config.to_dict() == before
    assert {p.device.type for p in scored.parameters()} == {"cpu"}
    assert scored.score.weight.std().item() == pytest.approx(65**-0.5, rel=0.3)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real preference file")
def test_real_file(tmp_path: Path, base: Path) -> None:
    data = {
        "train": str(SHARED / "data" / "dpo_zh_demo.json"),
        "max_length": 1024,
        "max_samples": 6,
        "max_dropped": 1.0,
    }
    steps = {"max_steps": 2, "effective_batch_size": 2}
    assert len(logged(run_reward(reward_recipe(tmp_path, base, data=data, train=steps)), "loss")) == 2
