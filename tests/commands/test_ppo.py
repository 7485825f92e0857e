"""`ft ppo`: ratios of one at first, one base or four, exact resume, what is refused and what stops a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, tensors, train, write_rows
from rl_kit import comparable, here, logged, pairs, ppo_recipe, result, reward_recipe, rule, run_ppo, run_reward, scaled
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import LlamaMLP

from finetune import child
from finetune.adapters.multiple import named
from finetune.commands import ppo
from finetune.data.pairs import load_pairs
from finetune.data.prompts import Prompt
from finetune.data.types import Conversation
from finetune.errors import Interrupted, RunError, UserError
from finetune.evaluation.generation import decode
from finetune.evaluation.rewards import RewardModel, score_rows, scored_reply
from finetune.models import hardware
from finetune.recipe.file import load
from finetune.recipe.sections import DataConfig
from finetune.recipe.stages import PpoRecipe
from finetune.rl import arithmetic
from finetune.rl import models as ppo_models
from finetune.rl.ppo import Ppo
from finetune.rl.replies import together
from finetune.rl.rollout import Collector
from finetune.run.checkpoints import damage
from finetune.run.directory import Run
from finetune.training.health import ZERO_STEPS

DROPOUT = {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def rewarded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs of `ft reward`, one per method, made once."""
    made: dict[str, Run] = {}

    def run(method: str = "lora") -> Run:
        if method not in made:
            adapter = {"method": method, "r": 4} if method == "lora" else {"method": method}
            folder = tmp_path_factory.mktemp(method)
            made[method] = run_reward(reward_recipe(folder, base, adapter=adapter))
        return made[method]

    return run


def only_model(run: Run) -> dict[str, Any]:
    return {"model": str(run.path)}


# --- what it computes ---


@pytest.mark.parametrize(
    "adapter",
    [
        DROPOUT,
        {"method": "lora", "init_lora_weights": "pissa"},
        {"method": "bottleneck", "bottleneck_dropout": 0.3},
        {"method": "p_tuning", "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.3},
        {"method": "prompt_tuning"},
        {"method": "prefix_tuning", "prefix_projection": True},
        {"method": "bitfit"},
        {"method": "ia3"},
        {"method": "last_layers", "num_layers": 1, "head": True},
        {"method": "ln_tuning"},
        {"method": "vera"},
        {"method": "loha", "module_dropout": 0.3},
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_every_method_starts_at_ratio_one_and_kl_zero(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    """Dropout or not. And it trains: the proof in result.json says so."""
    monkeypatch.setattr(
        "finetune.recipe.effects.refused", lambda _: []
    )  # model.adapter may bring dropout; recipes may not
    found = run_ppo(ppo_recipe(tmp_path, base, adapter=adapter))
    assert max(logged(found, "first_log_ratio")) <= 1e-6
    first, second = logged(found, "kl")
    assert first == pytest.approx(0, abs=1e-7)
    assert second > 0
    assert result(found)["trained"]["changed_equals_declared"]
    assert not [key for key in tensors(found.adapter) if "ppo_" in key], "only the policy is saved"
    assert [p.name for p in found.adapter.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("int8", DROPOUT), ("int4", DROPOUT), ("int4", {"method": "lora", "init_lora_weights": "loftq"})],
)
def test_on_quantized_bases(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, kind: str, adapter: dict[str, Any]
) -> None:
    monkeypatch.setattr("finetune.recipe.effects.refused", lambda _: [])
    found = run_ppo(ppo_recipe(tmp_path, base, adapter=adapter, model={"quantization": kind}))
    assert max(logged(found, "first_log_ratio")) < 2e-2
    assert logged(found, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert all(norm > 0 for norm in logged(found, "grad_norm"))


@pytest.mark.parametrize("sampling", [{"top_k": 20}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.9, "temperature": 0.7}])
def test_truncated_sampling(tmp_path: Path, base: Path, sampling: dict[str, Any]) -> None:
    found = run_ppo(ppo_recipe(tmp_path, base, ppo={**sampling, "max_kl": 1000.0}))
    assert max(logged(found, "first_log_ratio")) <= 1e-6


@pytest.mark.parametrize("method", ["lora", "p_tuning", "prefix_tuning"])
def test_shared_equals_separate(tmp_path: Path, base: Path, rewarded: Callable[[str], Run], method: str) -> None:
    """Four adapters on one base do what four models do: metrics and the policy's weights."""
    runs = []
    for models in ("shared", "separate"):
        path = ppo_recipe(
            tmp_path, base, models, reward=only_model(rewarded(method)), ppo={"models": models},
            adapter={"method": method, "r": 4} if method == "lora" else {"method": method}, train={"max_steps": 3},
        )  # fmt: skip
        runs.append(run_ppo(path))
    for a, b in zip(*(comparable(run) for run in runs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    a, b = (tensors(run.adapter) for run in runs)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)


def test_scores_are_those_of_the_reward_run(tmp_path: Path, base: Path, rewarded: Callable[[str], Run]) -> None:
    """Through the adapter on the shared base, through plain peft, and by hand from the tokens."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = rewarded("lora")
    found = run_ppo(ppo_recipe(tmp_path, base, reward=only_model(run), ppo={"max_new_tokens": 4}))
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model, tokenizer = PeftModel.from_pretrained(network, run.adapter).eval(), AutoTokenizer.from_pretrained(base)
    compared = 0
    for line in (found.path / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        reply = tokenizer(row["reply"])["input_ids"]
        if "\ufffd" in row["reply"] or len(reply) != 4:
            continue  # bytes that are no text cannot be read back
        asked = tokenizer(f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        ids = [*asked, *reply, tokenizer.eos_token_id]  # cut off, and scored with its end as all that it was trained on
        with torch.no_grad():
            assert model(input_ids=torch.tensor([ids])).logits.item() == pytest.approx(row["score"], abs=1e-4)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("models", ["shared", "separate"])
def test_chatglm_replies_are_scored_before_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    """Its end token separates documents: neither pairs nor replies are read at it, wherever they are scored. A reply
    that ends with the next turn's role, as ChatGLM3 often does, has the same score."""
    base = Path(__file__).parents[1] / "fixtures" / "chatglm" / "chatglm3" / "checkpoint"
    reward = run_reward(reward_recipe(tmp_path, base, train={"max_steps": 1}))
    reward_model = RewardModel.load(str(reward.path), torch.float32, hardware.detect())
    end = reward_model.encoder.separator
    config = DataConfig(train=str(tmp_path / "pairs.jsonl"))
    rows = load_pairs(config, reward_model.encoder, to_score=True).train
    trained = {name: [row[f"{name}_ids"] for row in rows] for name in ("chosen", "rejected")}
    assert not any(end in ids for found in trained.values() for ids in found)
    looked = []

    def look(self: Ppo, *_: Any) -> dict[str, Any]:
        prompts, texts = self.prompts_of(0)[:2], ["no", "yes please"]
        turns = [[*p.messages, {"role": "assistant", "content": text}] for p, text in zip(prompts, texts, strict=True)]
        ids = [scored_reply(reward_model.encoder, Conversation(turn, None)) for turn in turns]
        assert not any(end in row for row in ids)
        stops = self.collector.stops
        assert len(stops) == 3
        for stop in stops:
            replies = [[*row[len(p.ids) :], stop] for row, p in zip(ids, prompts, strict=True)]
            made = together([p.ids for p in prompts], replies, [stop], 0, "cpu")
            written = [decode(self.encoder, made.text_ids(i, stops), stops) for i in range(2)]
            assert written == texts
            scores, _ = self.collector.score(prompts, written)
            assert scores == pytest.approx(reward_model.score(prompts, texts), abs=1e-5)
            assert scores == pytest.approx(score_rows(reward_model.model, ids, 0), abs=1e-5)
        looked.append(models)
        raise RunError("seen enough")

    monkeypatch.setattr(Ppo, "fit", look)
    with pytest.raises(RunError, match="seen enough"):
        run_ppo(ppo_recipe(tmp_path, base, reward=only_model(reward), ppo={"models": models}))
    assert looked


@pytest.mark.parametrize("models", ["shared", "separate"])
def test_a_reply_has_one_score_everywhere(
    tmp_path: Path, base: Path, rewarded: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    """Ended, cut off, within white space, empty: as `ft eval --reward` scores the text and `ft reward` reads a pair."""
    reward = rewarded("lora")
    reward_model = RewardModel.load(str(reward.path), torch.float32, hardware.detect())
    looked = []

    def look(self: Ppo, *_: Any) -> dict[str, Any]:
        encode, stop = self.encoder.tokenizer.encode, self.encoder.end_id
        prompts = self.prompts_of(0)[:4]
        replies = [[*encode("yes please"), stop], encode("yes pl"), [*encode("  yes \n"), stop], [stop]]
        made = together([p.ids for p in prompts], replies, [stop], 0, "cpu")
        stops = self.collector.stops
        texts = [decode(self.encoder, made.text_ids(i, stops), stops) for i in range(4)]
        assert texts == ["yes please", "yes pl", "yes", ""]
        scores, _ = self.collector.score(prompts, texts)
        assert scores == pytest.approx(reward_model.score(prompts, texts), abs=1e-5)
        rows = [{"prompt": p.text, "chosen": t, "rejected": "x"} for p, t in zip(prompts[:3], texts, strict=False)]
        read = load_pairs(
            DataConfig(train=str(write_rows(tmp_path / "as_pairs.jsonl", rows))), reward_model.encoder, to_score=True
        ).train
        assert scores[:3] == pytest.approx(score_rows(reward_model.model, list(read["chosen_ids"]), 0), abs=1e-5)
        looked.append(models)
        raise RunError("seen enough")

    monkeypatch.setattr(Ppo, "fit", look)
    with pytest.raises(RunError, match="seen enough"):
        run_ppo(ppo_recipe(tmp_path, base, reward=only_model(reward), ppo={"models": models}))
    assert looked


def test_a_classification_model_of_another_family_pays(tmp_path: Path, base: Path, encoder: Path) -> None:
    """An encoder with its own tokenizer, beside a causal policy."""
    found = run_ppo(ppo_recipe(tmp_path, base, reward={"model": str(encoder)}, ppo={"models": "separate"}))
    assert result(found)["trained"]["changed_equals_declared"]
    samples = [json.loads(line) for line in found.samples.read_text("utf-8").splitlines()]
    reward_model = RewardModel.load(str(encoder), torch.float32, hardware.detect())
    asked = [Prompt([], [{"role": "user", "content": row["prompt"]}], None, {}) for row in samples]
    scores = reward_model.score(asked, [row["reply"] for row in samples])
    assert scores == pytest.approx([row["score"] for row in samples], abs=1e-5)


def test_what_does_not_learn_stays(
    tmp_path: Path, base: Path, rewarded: Callable[[str], Run], recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference and reward adapter bit for bit; the reference is where model.adapter starts, at KL zero."""
    start = train(recipe(train={"max_steps": 8}))
    seen: dict[str, Any] = {}

    def kept(model: Any, name: str) -> dict[str, torch.Tensor]:
        return {k: t.detach().clone() for k, t in named(model, name).items()}

    whole = ppo_models.build

    def build(*arguments: Any) -> ppo_models.PpoModels:
        models = whole(*arguments)
        seen["model"] = model = models.policy.model
        seen["before"] = {a: kept(model, a) for a in ("ppo_reference", "ppo_reward", "ppo_value", "default")}
        return models

    monkeypatch.setattr(ppo_models, "build", build)
    found = run_ppo(ppo_recipe(tmp_path, base, reward=only_model(rewarded("lora")), model={"adapter": str(start.path)}))
    assert logged(found, "kl")[0] == pytest.approx(0, abs=1e-7)
    assert logged(found, "kl")[1] > 0
    model, before = seen["model"], seen["before"]
    stored = tensors(rewarded("lora").adapter)
    for key, tensor in before["ppo_reward"].items():
        assert torch.equal(tensor, stored[key.replace(".*", "")])
    for key, tensor in before["default"].items():
        assert torch.equal(tensor, before["ppo_reference"][key])
    for adapter, changes in {"ppo_reference": False, "ppo_reward": False, "ppo_value": True, "default": True}.items():
        after = named(model, adapter)
        assert all(torch.equal(t, after[k]) != changes for k, t in before[adapter].items()), adapter
    # What is saved is the policy, and loads like any adapter.
    ours = {k.replace(".*", ""): t for k, t in named(model, "default").items()}
    assert all(torch.equal(t, ours[k]) for k, t in tensors(found.adapter).items())


@pytest.mark.parametrize("method", ["p_tuning", "prefix_tuning"])
def test_goes_on_from_a_saved_soft_prompt(tmp_path: Path, base: Path, recipe: Any, method: str) -> None:
    """Saved is what a network made: reference and value are copies of that."""
    path = recipe(train={"max_steps": 4}, adapter={"method": method, "r": None, "lora_alpha": None})
    import yaml

    values = yaml.safe_load(path.read_text())
    values["adapter"] = {"method": method}
    path.write_text(yaml.safe_dump(values))
    start = train(path)
    found = run_ppo(ppo_recipe(tmp_path, base, model={"adapter": str(start.path)}, adapter={"method": method}))
    assert max(logged(found, "first_log_ratio")) <= 1e-6
    assert logged(found, "kl")[0] == pytest.approx(0, abs=1e-7)
    a, b = tensors(start.adapter)["prompt_embeddings"], tensors(found.adapter)["prompt_embeddings"]
    assert a.shape == b.shape
    assert not torch.equal(a, b)


def test_full_and_separate(tmp_path: Path, base: Path) -> None:
    found = run_ppo(
        ppo_recipe(
            tmp_path, base, adapter={"method": "full"}, ppo={"models": "separate"}, train={"learning_rate": 1e-3}
        )
    )
    assert logged(found, "kl")[0] == pytest.approx(0, abs=1e-7)
    assert (found.model / "config.json").exists()
    said = result(found)["generation"]
    assert (said["temperature"], said["top_k"], said["not_followed"]) == (1.0, 0, {})


# --- it learns ---


def test_a_rule_is_learned(tmp_path: Path, base: Path) -> None:
    """The share of letters in the replies rises, on held-out prompts, too. (The base's own head is so small that
    nothing before it changes a probability much.)"""
    held_out = write_rows(tmp_path / "held.jsonl", [{"prompt": f"tell {i}"} for i in range(24)])
    path = ppo_recipe(
        tmp_path, scaled(base, tmp_path / "sharp", 8.0), train={"max_steps": 13, "learning_rate": 2e-2},
        eval={"data": str(held_out)}, ppo={"max_kl": 1000.0, "max_update_kl": 1.0, "kl_coef": 0.01},
    )  # fmt: skip
    found = run_ppo(path)
    rewards = logged(found, "reward_mean")
    assert rewards[0] < 0.3
    # Of three rollouts: at this rate a single one hangs on the last bit (0.54 to 0.67 with six seeds and shapes).
    assert sum(rewards[-3:]) / 3 > 0.5
    outcome = result(found)["eval"]
    assert outcome["reward_mean"] == pytest.approx(outcome["reward_before"] + outcome["reward_difference"])
    assert outcome["reward_difference_ci"][0] > 0.3
    assert logged(found, "kl")[-1] > 0


def test_held_out_prompts_have_the_same_columns(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, held_out = (write_rows(tmp_path / f"{n}.jsonl", [{"ask": f"{n} {i}"} for i in range(24)]) for n in "ab")
    data = {"train": str(asked), "columns": {"prompt": "ask"}}
    recipe = load(str(ppo_recipe(tmp_path, base, data=data, eval={"data": str(held_out)})), PpoRecipe)
    ppo.run(recipe, dry_run=True)
    assert "24 rows" in capsys.readouterr().err


def test_several_rewards_are_weighed(tmp_path: Path, base: Path, rewarded: Callable[[str], Run]) -> None:
    one = rule(tmp_path, "def f(prompts, completions, **_):\n    return [1.0] * len(prompts)\n", "one.py")
    (tmp_path / "b").mkdir()
    two = rule(tmp_path / "b", "def f(prompts, completions, **_):\n    return [2.0] * len(prompts)\n", "one.py")
    sources = {"model": str(rewarded("lora").path), "functions": [f"{one}:f", f"{two}:f"], "weights": [0.5, 10, 100]}
    found = run_ppo(ppo_recipe(tmp_path, base, reward=sources, train={"max_steps": 1}))
    row = found.read_metrics()[0]
    assert row[f"rewards/{one}:f"] == 1.0, "two files of one name are told apart"
    assert row[f"rewards/{two}:f"] == 2.0
    assert row["reward_mean"] == pytest.approx(0.5 * row["rewards/model"] + 10 + 200)


def test_a_run_that_is_overwritten_leaves_nothing(tmp_path: Path, base: Path) -> None:
    path = ppo_recipe(tmp_path, base)
    before = comparable(run_ppo(path))
    again = run_ppo(path, overwrite=True)
    assert comparable(again) == before
    assert len((again.path / "samples.jsonl").read_text().splitlines()) == 8, "none of the run before"


def test_one_command_from_pairs_goes_on_after_a_stop_while_the_reward_model_trains(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And after a kill before the first checkpoint of PPO. The run that is stopped has a process of its own, to which
    alone the signal goes, and so has its child."""
    sections = {"reward": {"train": str(pairs(tmp_path, 64)), "num_train_epochs": 8}}
    with monkeypatch.context() as patch:
        patch.setattr(child, "run", here)
        whole = run_ppo(ppo_recipe(tmp_path, base, "whole", **sections))
    lines = capfd.readouterr().err.splitlines()
    assert not any("set reward.model" in line for line in lines)
    assert sum(line.startswith("done in") for line in lines) == 2, "the reward model's figures, too"
    assert sum(line.startswith("next ") for line in lines) == 1, "what to type next, of the whole"
    assert json.loads((whole.path / "reward" / "result.json").read_text())["stage"] == "reward"
    assert len(logged(whole, "reward_mean")) == 2
    path = ppo_recipe(tmp_path, base, "broken", **sections)
    command = [sys.executable, "-m", "finetune", "ppo", "--recipe", str(path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(tmp_path.glob("broken/reward/checkpoints/*/complete")):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)  # to it alone: its child must not go on by itself
    _, said = running.communicate()
    assert running.returncode == 130, said
    again = f"go on with ft ppo --recipe {tmp_path / 'broken' / 'recipe.yaml'} --resume"
    assert f"stopped while training the reward model; {again}" in said
    assert said.count("go on with") == said.count(again), "its child names no command of its own"
    metrics = tmp_path / "broken" / "reward" / "metrics.jsonl"
    written = metrics.read_text("utf-8")
    assert not (tmp_path / "broken" / "reward" / "result.json").exists()
    assert metrics.read_text("utf-8") == written
    with pytest.raises(UserError, match="--resume to go on"):
        run_ppo(path)

    def killed(self: Ppo) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ppo, "save", killed)
        patch.setattr(child, "run", here)
        with pytest.raises(Interrupted, match="interrupted; go on with ft ppo"):
            run_ppo(path, resume=True)
    broken = run_ppo(path, resume=True)
    assert comparable(broken) == comparable(whole)
    a, b = (tensors(run.reward / "adapter") for run in (whole, broken))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(16)],
        [
            {"messages": [{"role": "user", "content": f"p {i}"}, {"role": "assistant", "content": "a"}]}
            for i in range(16)
        ],
        [{"messages": [{"role": "user", "content": f"p {i}"}]} for i in range(16)],
    ],
    ids=["pairs", "answered", "asked"],
)
def test_any_rows_are_prompts(tmp_path: Path, base: Path, rows: list[dict[str, Any]]) -> None:
    text = (
        "def f(prompts, completions, reference, **_):\n"
        f"    assert set(reference) == {{{'None' if len(rows[0].get('messages', '12')) == 1 else repr('a')}}}\n"
        "    return [float(p.startswith('p ')) for p in prompts]\n"
    )
    data = {"train": str(write_rows(tmp_path / "some.jsonl", rows))}
    found = run_ppo(
        ppo_recipe(
            tmp_path, base, data=data, reward={"functions": [f"{rule(tmp_path, text)}:f"]}, train={"max_steps": 1}
        )
    )
    assert logged(found, "reward_mean") == [1.0]


# --- the same again ---


@pytest.mark.parametrize("adapter", [DROPOUT, {"method": "p_tuning"}], ids=["lora", "p_tuning"])
def test_resume_is_exact(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]) -> None:
    """Stopped by a signal in the second of four rollouts; the seed makes the uninterrupted run the same, too."""
    monkeypatch.setattr("finetune.recipe.effects.refused", lambda _: [])
    held_out = write_rows(tmp_path / "held.jsonl", [{"prompt": f"tell {i}"} for i in range(4)])
    drawing = "import random\nimport numpy\n\ndef f(prompts, completions, **_):\n"
    drawing += "    return [len(c) + random.random() + numpy.random.rand() for c in completions]\n"
    settings: dict[str, Any] = {
        "adapter": adapter, "train": {"max_steps": 4, "lr_scheduler_type": "cosine", "save_steps": 3},
        "reward": {"functions": [f"{rule(tmp_path, drawing)}:f"]},
        "ppo": {"kl_target": 0.05}, "eval": {"data": str(held_out)},
    }  # fmt: skip
    whole = run_ppo(ppo_recipe(tmp_path, base, "whole", **settings))
    assert sorted(p.name for p in whole.checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    path = ppo_recipe(tmp_path, base, "broken", **settings)
    step = Ppo.step

    def interrupted(self: Ppo, *arguments: Any) -> dict[str, Any]:
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Ppo, "step", interrupted)
        with pytest.raises(Interrupted, match=r"stopped at step 2.*--resume"):
            run_ppo(path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    broken = run_ppo(path, resume=True)
    assert comparable(broken) == comparable(whole)
    a, b = tensors(whole.adapter), tensors(broken.adapter)
    assert all(torch.equal(a[key], b[key]) for key in a)
    for key in ("eval", "train_loss"):
        assert result(broken)[key] == result(whole)[key]
    assert broken.samples.read_text("utf-8") == whole.samples.read_text("utf-8")


def test_a_signal_in_the_last_rollout_finishes_the_run(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does resuming after a kill between the last checkpoint and result.json."""
    step = Ppo.step

    def interrupted(self: Ppo, *arguments: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Ppo, "step", interrupted)
    path = ppo_recipe(tmp_path, base, train={"max_steps": 1})
    found = run_ppo(path)
    first = result(found)
    assert first["status"] == "done"
    found.result.unlink()
    again = result(run_ppo(path, resume=True))
    assert again["train_loss"] == pytest.approx(first["train_loss"])
    assert again["trained"] is None


def test_seeds(tmp_path: Path, base: Path) -> None:
    first, again, other = (
        run_ppo(ppo_recipe(tmp_path, base, f"run{i}", train={"seed": seed})) for i, seed in enumerate((1, 1, 2))
    )
    assert comparable(first) == comparable(again)
    assert comparable(first) != comparable(other)


def test_minibatches_in_parts_are_the_same(tmp_path: Path, base: Path) -> None:
    """Rows per forward pass change memory, not the outcome."""
    runs = [
        run_ppo(ppo_recipe(tmp_path, base, f"by{rows}", train={"per_device_train_batch_size": rows})) for rows in (8, 3)
    ]
    for a, b in zip(*(comparable(run) for run in runs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are computed again, and by the adapter that computed them first."""
    forward, calls, runs = LlamaMLP.forward, [0, 0], []
    for i, again in enumerate((False, True)):

        def counted(*arguments: Any, i: int = i, **options: Any) -> Any:
            calls[i] += 1
            return forward(*arguments, **options)

        monkeypatch.setattr(LlamaMLP, "forward", counted)
        runs.append(run_ppo(ppo_recipe(tmp_path, base, f"run{i}", train={"gradient_checkpointing": again})))
    assert calls[0] < calls[1]
    for a, b in zip(*(comparable(run) for run in runs), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert all(t.any() for t in tensors(runs[1].adapter).values()), "B starts at zero"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, base: Path, dtype: str) -> None:
    """Nearly the same gradients, float32 weights that move, and in float16 a scaled loss."""
    plain, half = (run_ppo(ppo_recipe(tmp_path, base, name, model={"dtype": name})) for name in ("float32", dtype))
    assert comparable(half) != comparable(plain)
    assert logged(half, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.2)
    assert max(logged(half, "first_log_ratio")) <= 1e-6
    assert logged(half, "kl")[1] > 0
    saved = tensors(half.adapter).values()
    assert all(t.dtype == torch.float32 and t.any() for t in saved), "B starts at zero"
    kept = torch.load(half.checkpoints / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert bool(kept["scaler"]) == (dtype == "float16"), "a GradScaler was at work"


def test_full_in_half_precision(tmp_path: Path, base: Path) -> None:
    """The weights are held in float32, and not what is computed with them."""
    settings: dict[str, Any] = {"adapter": {"method": "full"}, "ppo": {"models": "separate"}}
    settings["train"] = {"learning_rate": 1e-3, "max_steps": 1}
    plain, half = (
        run_ppo(ppo_recipe(tmp_path, base, name, model={"dtype": name}, **settings)) for name in ("float32", "bfloat16")
    )
    assert comparable(half) != comparable(plain)
    assert logged(half, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=0.2)


# --- what is refused, before a model is loaded, and what stops a run ---


def refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that says why."""
    monkeypatch.setattr("finetune.models.loading.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError) as caught:
        run_ppo(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"adapter": {"method": "full"}}, "set ppo.models: separate"),
        ({"adapter": {"method": "adalora"}}, "use lora"),
        ({"ppo": {"num_mini_batches": 3}}, "does not divide train.effective_batch_size"),
        ({"reward": {}}, "nothing scores the replies"),
        ({"reward": {"functions": ["/nowhere.py:f"]}}, "no such file"),
        ({"reward": {"functions": ["/nowhere.py:f"], "weights": [1.0, 2.0]}}, "2 for 1 source"),
        ({"reward": {"model": "some/hub-model"}}, "set ppo.models: separate"),
        ({"reward": {"model": "some/hub-model"}, "ppo": {"models": "separate"}}, "some/hub-model"),
        ({"reward": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"train": {"optim": "muon"}}, "train.optim: has no effect"),
        ({"train": {"group_by_length": False}}, "train.group_by_length: has no effect"),
        ({"data": {"packing": True}}, "data.packing: has no effect"),
        ({"reward": {"functions": ["rules.py"]}}, "not a rule: 'rules.py'"),
        ({"reward": {"model": "./runs/rewrad"}}, "./runs/rewrad: reward.model: no such model"),
        ({"data": {"eval_split": 0.1}}, "data.eval_split: has no effect"),
        ({"train": {"effective_batch_size": 64}, "ppo": {"num_mini_batches": 64}}, "32 prompts are too few"),
        ({"data": {"max_length": 3}}, "no prompt is left"),
    ],
)
def test_refusals(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], what: str
) -> None:
    assert what in refused(ppo_recipe(tmp_path, base, **sections), monkeypatch)
    assert not (tmp_path / "ppo").exists()


def test_reward_runs_that_do_not_fit(
    tmp_path: Path, base: Path, rewarded: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = only_model(rewarded("lora"))
    prefix = ppo_recipe(tmp_path, base, "a", reward=source, adapter={"method": "prefix_tuning"})
    other = ppo_recipe(tmp_path, scaled(base, tmp_path / "other", 2.0), "b", reward=source)
    pissa = ppo_recipe(tmp_path, base, "c", reward=source, adapter={"method": "lora", "init_lora_weights": "pissa"})
    assert "the reward model is LORA, the policy PREFIX_TUNING" in refused(prefix, monkeypatch)
    assert "base" in refused(other, monkeypatch)
    assert "rewrites the base" in refused(pissa, monkeypatch)


@pytest.mark.parametrize("models", ["shared", "separate"])
def test_what_is_no_reward_model_is_refused_first(
    tmp_path: Path, base: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    sft = train(recipe(train={"max_steps": 1}))
    path = ppo_recipe(tmp_path, base, reward=only_model(sft), ppo={"models": models})
    assert ("no score head" if models == "separate" else "is no run of `ft reward`") in refused(path, monkeypatch)
    assert not (tmp_path / "ppo").exists()


def test_overwrite_spares_what_the_run_reads(
    tmp_path: Path, base: Path, rewarded: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model that an earlier run trained in this very directory, say."""
    inside = tmp_path / "ppo" / "reward"
    shutil.copytree(rewarded("lora").path, inside)
    path = ppo_recipe(tmp_path, base, reward={"model": str(inside)})
    with pytest.raises(UserError, match=r"ppo/reward: reward\.model: would be deleted by --overwrite"):
        run_ppo(path, overwrite=True)
    assert (inside / "result.json").exists()


def test_prompts_that_the_template_refuses(tmp_path: Path, base: Path) -> None:
    """All of them, with file and row; or left out, if that is asked for."""
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    user = {"role": "user", "content": "say 1"}
    rows = [{"messages": [user]} for _ in range(30)] + [{"messages": [{"role": "system", "content": "s"}, user]}] * 2
    data = {"train": str(write_rows(tmp_path / "asked.jsonl", rows))}
    model = {"chat_template": str(template)}
    with pytest.raises(UserError, match="no system turns") as caught:
        run_ppo(ppo_recipe(tmp_path, base, model=model, data=data))
    assert [f"asked.jsonl, row {n}" in str(caught.value) for n in (30, 31, 32)] == [False, True, True]
    drop = {"on_error": "drop", "max_dropped": 0.1}
    found = run_ppo(ppo_recipe(tmp_path, base, model=model, data={**data, **drop}, train={"max_steps": 1}))
    assert result(found)["data"]["dropped"] == 2
    long = {"max_length": 16, "on_overlong": "error"}
    with pytest.raises(UserError, match=r"row 1: the prompt has \d+ tokens, over data\.max_length 16"):
        run_ppo(ppo_recipe(tmp_path, base, "long", data=long))


def test_rollouts_of_few_prompts(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What --dry-run says is what happens."""
    train = {"max_steps": None, "num_train_epochs": 3, "effective_batch_size": 64}
    path = ppo_recipe(tmp_path, base, train=train, ppo={"num_mini_batches": 4})
    ppo.run(load(str(path), PpoRecipe), dry_run=True)
    assert "3 rollouts of 32 prompts; updates of 16 rows x 1 pass" in capsys.readouterr().err
    found = run_ppo(path)
    assert result(found)["steps"] == 3
    assert "32 prompts: rollouts are of 32" in result(found)["decisions"]


@pytest.mark.whole
def test_out_of_memory_says_what_to_do(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Collector, *_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(Collector, "collect", full)
    with pytest.raises(RunError, match=r"out of memory .*Ways out: train\.per_device_train_batch_size"):
        run_ppo(ppo_recipe(tmp_path, base))


def test_exit_code_of_a_refusal(tmp_path: Path, base: Path) -> None:
    done = ft("ppo", "--recipe", ppo_recipe(tmp_path, base, adapter={"method": "full"}))
    assert done.returncode == 2
    assert "ppo.models: separate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('no')", "ValueError: no"),
        ("return [0.0]", "1 score for 16 replies"),
        ("return [float('nan')] * len(prompts)", "the score nan"),
    ],
)
def test_rules_that_fail(tmp_path: Path, base: Path, body: str, what: str) -> None:
    file = rule(tmp_path, f"def f(prompts, completions, **_):\n    {body}\n")
    with pytest.raises(RunError, match=what):
        run_ppo(ppo_recipe(tmp_path, base, reward={"functions": [f"{file}:f"]}))


@pytest.mark.parametrize(("models", "name"), [("shared", "the reward model"), ("separate", "broken")])
def test_a_reward_model_that_gives_no_number(
    tmp_path: Path, base: Path, rewarded: Callable[[str], Run], models: str, name: str
) -> None:
    broken = Run(shutil.copytree(rewarded("lora").path, tmp_path / "broken"))
    file = broken.adapter / "adapter_model.safetensors"
    save_file({k: t * math.nan if "score" in k else t for k, t in tensors(broken.adapter).items()}, file)
    with pytest.raises(RunError, match=f"{name} gave reply 1 of 16 the score nan"):
        run_ppo(ppo_recipe(tmp_path, base, reward=only_model(broken), ppo={"models": models}))


def test_a_policy_that_runs_away_is_stopped(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RunError, match=r"over ppo\.max_kl.*lower train\.learning_rate"):
        run_ppo(ppo_recipe(tmp_path, base, train={"max_steps": 5, "logging_steps": 7}, ppo={"max_kl": 1e-4}))
    *_, last = Run(tmp_path / "ppo").read_metrics()
    assert last["step"] > 1
    assert last["kl"] > 1e-4, "the reason is on record"


def test_degenerate_replies_stop_a_run(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Ppo.step

    def worse(self: Ppo, *arguments: Any) -> dict[str, Any]:
        return {**step(self, *arguments), "repetition": 0.0 if self.state.step == 1 else 0.9}

    monkeypatch.setattr(Ppo, "step", worse)
    path = ppo_recipe(tmp_path, base, train={"max_steps": 9})
    with pytest.raises(RunError, match=r"degenerated for 3 rollouts: 90% .*raise ppo\.kl_coef"):
        run_ppo(path)
    assert (tmp_path / "ppo" / "checkpoints" / "checkpoint-4" / "complete").exists()


def test_a_policy_whose_gradient_goes_out(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value model goes on learning, so no norm is zero."""
    loss, step = arithmetic.policy_loss, Ppo.step

    def nothing(*of: Any) -> arithmetic.PolicyLoss:
        found = loss(*of)
        return found._replace(loss=0 * found.loss)

    def flat(self: Ppo, *arguments: Any) -> dict[str, Any]:
        if self.state.step == 2:
            monkeypatch.setattr(arithmetic, "policy_loss", nothing)
        return step(self, *arguments)

    monkeypatch.setattr(Ppo, "step", flat)
    with pytest.raises(RunError, match=r"exactly zero for 3 rollouts up to step 5, .*nothing is learned") as caught:
        run_ppo(ppo_recipe(tmp_path, base, train={"max_steps": 9, "save_steps": 2}))
    run = Run(tmp_path / "ppo")
    assert all(norm > 0 for norm in logged(run, "grad_norm"))
    assert f"the last checkpoint before is kept: {run.checkpoints / 'checkpoint-4'}" in str(caught.value)
    assert damage(run.checkpoints / "checkpoint-4") is None
    assert len((run.path / "failed_batch.jsonl").read_text("utf-8").splitlines()) == 16


def test_replies_of_one_score_may_wait_for_a_better_one(tmp_path: Path, base: Path) -> None:
    """A reward that is seldom paid: until then every advantage is zero, and so is every gradient."""
    file = rule(tmp_path, "def f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    run = run_ppo(ppo_recipe(tmp_path, base, reward={"functions": [f"{file}:f"]}, train={"max_steps": ZERO_STEPS + 1}))
    assert logged(run, "grad_norm") == [0.0] * (ZERO_STEPS + 1)
