"""`eval.during`: held-out rows are answered while a run trains, which changes nothing of what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ft, tensors, train, write_rows
from rl_kit import ppo_recipe, run_ppo
from test_sft import logged

from finetune.errors import UserError
from finetune.recipe.stages import HELD_OUT_FIGURES
from finetune.run.directory import Run
from finetune.training.trainers import Extras

Recipe = Callable[..., Path]
SHORT = {"max_new_tokens": 6, "batch_size": 3}
DRAWS = """
import random
import numpy, torch
def luck(prediction, reference):
    torch.rand(1)
    return random.random() + numpy.random.rand() + len(prediction) * 0
def length(prediction, reference):
    return len(prediction)
"""


def scripted(folder: Path, values: list[float]) -> str:
    """A metric with these values, one an evaluation, of runs with one held-out row that is answered."""
    path = folder / "scripted.py"
    path.write_text(
        f"from pathlib import Path\nat = Path({str(folder / 'at')!r})\n"
        "def value(prediction, reference):\n"
        "    if prediction == reference:\n        return 0.0  # tried before the training\n"
        "    at.write_text('x' + (at.read_text() if at.exists() else ''))\n"
        f"    return {values}[len(at.read_text()) - 1]\n"
    )
    return f"{path}:value"


def result(run: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.result.read_text())
    return found


def started(path: Path, stage: str) -> Run:
    said = ft(stage, path)
    assert said.returncode == 0, said.stderr
    return Run(Path(yaml.safe_load(path.read_text())["output"]["dir"]))


@pytest.mark.whole
def test_what_is_trained_is_as_it_would_be_without(
    recipe: Recipe, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, with dropout, checkpointing, drawn answers, and a metric that draws numbers itself."""
    (tmp_path / "draws.py").write_text(DRAWS)
    settings: dict[str, Any] = {
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.3},
        "train": {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0},
    }
    answering = {
        "data": str(rows), **SHORT, "generation": {"temperature": 1.0},
        "during": {"steps": 1, "metrics": f"{tmp_path / 'draws.py'}:luck, exact_match", "limit": 4},
    }  # fmt: skip
    modes: list[tuple[bool, bool]] = []
    evaluate = Extras.evaluate

    def watched(self: Any, *arguments: Any, **more: Any) -> Any:
        before = self.model.training
        found = evaluate(self, *arguments, **more)
        modes.append((before, self.model.training))
        return found

    monkeypatch.setattr(Extras, "evaluate", watched)
    plain = train(recipe(**settings, output={"dir": str(tmp_path / "plain")}))
    asked = train(recipe(**settings, eval=answering, output={"dir": str(tmp_path / "asked")}))
    assert modes == [(True, True)] * 4
    assert logged(asked, "loss") == logged(plain, "loss")
    a, b = tensors(asked.adapter), tensors(plain.adapter)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(logged(asked, "eval_exact_match")) == len(logged(asked, "eval_draws.py:luck")) == 4
    assert {"num_tokens", "loss"} <= asked.read_metrics()[0].keys(), "the figures of training stay with training"
    assert result(asked)["eval"].keys() == {"exact_match", "exact_match_ci", "draws.py:luck", "draws.py:luck_ci"}
    written = [json.loads(line) for line in asked.samples.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in written] == [step for step in (1, 2, 3, 4) for _ in range(4)]
    assert [row["prompt"] for row in written[:4]] == ["say 0", "say 1", "say 2", "say 3"]
    assert all(isinstance(row["reply"], str) and row["score"] >= 0 for row in written)
    assert not plain.samples.exists()
    shown = ft("runs", "watch", asked.path).stdout
    assert "step 4  say 0 → " in shown
    assert "step 3  say" not in shown


@pytest.mark.parametrize("best", [True, False])
def test_the_result_is_that_of_the_weights_that_were_saved(
    recipe: Recipe, rows: Path, tmp_path: Path, best: bool
) -> None:
    """Also where the last evaluation came before the last step; `ft eval` finds the same of the saved weights."""
    keep = {"load_best_model_at_end": True, "metric_for_best_model": "rougeL", "save_steps": 2} if best else {}
    run = train(
        recipe(
            train={"max_steps": 5, "learning_rate": 0.03, **keep},
            data={"eval_split": 6},
            eval={**SHORT, "during": {"steps": 2, "metrics": ["token_f1", "rougeL"]}},
        )
    )
    found = result(run)
    assert [row["step"] for row in run.read_metrics() if "eval_rougeL" in row] == [2, 4, 5]
    assert len(logged(run, "eval_loss")) == 3, "the held-out loss comes with them"
    if best:
        figures = logged(run, "eval_rougeL")
        step = (2, 4, 5)[figures.index(max(figures))]
        assert found["best_checkpoint"].endswith(f"checkpoint-{step}")
    said = ft("eval", run.path, "--metrics", "token_f1,rougeL,loss", "--json", "-", "--show", "0")
    assert said.returncode == 0, said.stderr
    again = json.loads(said.stdout)["runs"][0]["metrics"]
    for name in ("token_f1", "rougeL", "loss"):
        assert found["eval"][name] == pytest.approx(again[name], abs=1e-4)
    assert "rougeL" in (run.path / "report.html").read_text()


def test_the_best_by_a_metric_and_its_patience(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    """Higher is better where the metric has it so; the loss in between counts neither as better nor as worse."""
    spec = scripted(tmp_path, [1.0, 3.0, 2.0, 3.0, 9.0])
    settings: dict[str, Any] = {
        "train": {
            "max_steps": 12, "eval_steps": 1, "save_steps": 2, "early_stopping_patience": 2, "save_total_limit": 9,
            "metric_for_best_model": "scripted.py:value",
        },
        "data": {"eval_split": 6},
        "eval": {"data": str(rows), **SHORT, "during": {"steps": 2, "metrics": spec, "limit": 1}},
    }  # fmt: skip
    run = train(recipe(**settings))
    assert logged(run, "eval_scripted.py:value") == [1.0, 3.0, 2.0, 3.0]
    assert len(logged(run, "eval_loss")) == 8
    assert result(run)["best_checkpoint"].endswith("checkpoint-4")
    assert result(run)["eval"]["scripted.py:value"] == 3.0
    kept = tensors(run.checkpoints / "checkpoint-4")
    assert all(torch.equal(t, kept[k]) for k, t in tensors(run.adapter).items())

    run.result.unlink()  # killed after the sixth step: the best so far and the patience are known
    for step in (8,):
        shutil.rmtree(run.checkpoints / f"checkpoint-{step}")
    (tmp_path / "at").write_text("xxx")
    again = train(recipe(**settings), resume=True)
    assert logged(again, "eval_scripted.py:value") == [1.0, 3.0, 2.0, 3.0]
    assert result(again)["best_checkpoint"].endswith("checkpoint-4")
    assert all(torch.equal(t, kept[k]) for k, t in tensors(again.adapter).items())


def test_the_first_step_may_be_the_best(recipe: Recipe) -> None:
    """At it LoRA's A stands still. What is measured of it at the end is on record as that step's."""
    keep = {"load_best_model_at_end": True, "metric_for_best_model": "mean_token_accuracy", "save_steps": 1}
    run = train(  # so little is learned that the first of them stays the best
        recipe(
            train={"max_steps": 4, "learning_rate": 1e-6, "eval_steps": 1, **keep},
            data={"eval_split": 6},
            eval={**SHORT, "during": {"steps": 4, "metrics": "token_f1"}},
        )
    )
    found = result(run)
    assert found["best_checkpoint"].endswith("checkpoint-1")
    assert found["trained"]["changed_equals_declared"]
    assert [row["step"] for row in run.read_metrics() if "eval_token_f1" in row] == [4, 1]
    losses = [row["eval_loss"] for row in run.read_metrics() if row["step"] == 1 and "eval_loss" in row]
    assert losses == [pytest.approx(found["eval"]["loss"])] * 2


def test_a_run_that_goes_on_from_its_best_may_end_with_it(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "train": {"max_steps": 5, "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 9},
        "eval": {
            "data": str(rows), **SHORT,
            "during": {"steps": 1, "metrics": scripted(tmp_path, [1.0, 5.0, 1.0, 1.0, 1.0]), "limit": 1},
        },
    }  # fmt: skip
    run = train(recipe(**settings))
    run.result.unlink()  # killed after the second step
    for step in (3, 4, 5):
        shutil.rmtree(run.checkpoints / f"checkpoint-{step}")
    (tmp_path / "at").write_text("xx")
    again = train(recipe(**settings), resume=True)
    assert result(again)["best_checkpoint"].endswith("checkpoint-2")
    assert result(again)["trained"]["changed_equals_declared"]


@pytest.mark.parametrize(
    ("stage", "best", "low"), [("dpo", "rewards/rejected", True), ("kto", "rewards/margins", False)]
)
def test_pairs_and_labelled_answers(recipe: Recipe, tmp_path: Path, stage: str, best: str, low: bool) -> None:
    """The chosen answer, or a good one, is the reference; the stage's own figures can choose, in their direction."""
    pairs = [{"prompt": f"say {i}", "chosen": f"{i} yes", "rejected": f"{i} no"} for i in range(24)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    run = started(
        recipe(
            stage=stage, data={"train": str(data), "eval_split": 6},
            train={"max_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": best},
            eval={**SHORT, "during": {"steps": 1, "metrics": "token_f1"}},
        ),
        stage,
    )  # fmt: skip
    assert len(logged(run, "eval_token_f1")) == 3
    assert all(logged(run, f"eval_{name}") for name in HELD_OUT_FIGURES[stage])
    figures = logged(run, f"eval_{best}")
    assert result(run)["best_checkpoint"].endswith(f"-{1 + figures.index((min if low else max)(figures))}")
    assert result(run)["eval"]["token_f1"] in logged(run, "eval_token_f1")


def test_ppo_answers_held_out_prompts(base: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(4)])
    during = {"data": str(held), "during": {"steps": 1, "metrics": "token_f1", "limit": 3}}
    asked = run_ppo(ppo_recipe(tmp_path, base, "asked", eval=during, train={"max_steps": 2}))
    plain = run_ppo(ppo_recipe(tmp_path, base, "plain", eval={"data": str(held)}, train={"max_steps": 2}))
    assert len(logged(asked, "eval_reward_mean")) == len(logged(asked, "eval_token_f1")) == 2
    a, b = tensors(asked.adapter), tensors(plain.adapter)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"eval": {"during": {}}}, "eval.during: no rows are held out to be answered"),
        ({"stage": "pretrain", "eval": {"during": {"steps": 2}}}, "eval.during: raw text"),
        ({"stage": "reward", "eval": {"during": {}}}, "eval.during: a reward model"),
        ({"data": {"eval_split": 6}, "train": {"metric_for_best_model": "loss"}}, "the last weights are kept"),
        (
            {"data": {"eval_split": 6}, "train": {"load_best_model_at_end": True, "metric_for_best_model": "rougeL"}},
            "train.metric_for_best_model: rougeL is no held-out figure of ft sft; one of loss, mean_token_accuracy, or",
        ),
        (
            {
                "data": {"eval_split": 6}, "eval": {"during": {"metrics": "token_f1"}},
                "train": {"early_stopping_patience": 2, "metric_for_best_model": "eval_rougeL"},
            },
            "train.metric_for_best_model: rougeL is not in eval.during.metrics (token_f1)",
        ),
        (
            {"data": {"eval_split": 6}, "train": {"eval_steps": 2}, "eval": {"during": {"steps": 3}}},
            "eval.during.steps: 3 is no multiple of train.eval_steps 2",
        ),
        ({"data": {"eval_split": 6}, "eval": {"during": {"steps": 9}}}, "eval.during.steps: 9 steps between"),
        ({"data": {"eval_split": 6}, "eval": {"during": {"metrics": "rouge"}}}, "eval.during.metrics: no metric"),
        ({"data": {"eval_split": 6}, "eval": {"during": {"metrics": ""}}}, "eval.during.metrics: names no metric"),
        ({"eval": {"metrics": []}}, "eval.metrics: names no metric"),
        ({"data": {"eval_split": 6}, "eval": {"during": {"metrics": "loss"}}}, "loss is no metric of written answers"),
        (
            {
                "eval": {"data": "{rows}", "during": {}},
                "train": {"load_best_model_at_end": True, "metric_for_best_model": "loss"},
            },
            "loss is measured on the rows of data.eval_split",
        ),
        (
            {
                "data": {"eval_split": 6}, "eval": {"during": {}},
                "train": {"load_best_model_at_end": True, "metric_for_best_model": "bleu"},
            },
            "train.metric_for_best_model: bleu is not measured",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(recipe: Recipe, rows: Path, sections: dict[str, Any], said: str) -> None:
    sections = json.loads(json.dumps(sections).replace("{rows}", str(rows)))
    path = recipe(**sections)
    found = ft(sections.get("stage", "sft"), path, "--dry-run")
    assert found.returncode == 2
    assert said in found.stderr + found.stdout


def test_ppo_refuses_what_is_not_of_answers(base: Path, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "say 1", "completion": "1"}])
    path = ppo_recipe(tmp_path, base, "asked", eval={"data": str(held), "during": {"metrics": "loss"}})
    found = ft("ppo", path, "--dry-run")
    assert found.returncode == 2, found.stderr
    assert "eval.during.metrics: loss is no metric of written answers" in found.stderr


def test_without_a_split_the_first_metric_chooses(recipe: Recipe, rows: Path, tmp_path: Path) -> None:
    run = train(
        recipe(
            train={"max_steps": 2, "save_steps": 1, "load_best_model_at_end": True},
            eval={"data": str(rows), **SHORT, "during": {"metrics": scripted(tmp_path, [2.0, 1.0]), "limit": 1}},
        )
    )
    assert result(run)["best_checkpoint"].endswith("checkpoint-1")
    assert result(run)["eval"]["scripted.py:value"] == 2.0
    resolved = (run.path / "recipe.yaml").read_text()
    assert "steps: 1" in resolved[resolved.index("during:") :]


def test_rows_without_answers_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "say 1"}])
    with pytest.raises(UserError, match="no row has a reference"):
        train(recipe(eval={"data": str(held), "during": {}}))
