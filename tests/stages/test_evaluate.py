"""`ft eval`: figures that can be checked by hand, the base beside the tuned model, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ft, train

from finetune.errors import UserError
from finetune.stages import evaluate

Recipe = Callable[..., Path]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "say" * n}, {"role": "assistant", "content": json.dumps({"n": n})}]}
        for n in range(1, 8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_run_and_base(recipe: Recipe, held_out: Path, tmp_path: Path) -> None:
    train(recipe(eval={"data": str(held_out), "max_new_tokens": 8, "batch_size": 3}))
    file = tmp_path / "eval.json"
    done = ft("eval", "run", "--compare-base", "--json", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout
    written = json.loads(file.read_text())
    assert [run["name"] for run in written["runs"]] == ["base", "run"]
    base, tuned = (run["metrics"] for run in written["runs"])
    assert written["runs"][0]["n"] == 7
    assert base["perplexity"] == pytest.approx(torch.tensor(base["loss"]).exp().item(), rel=1e-5)
    assert base["loss"] != tuned["loss"]
    assert set(base["fields"]) == {"n"}
    (comparison,) = written["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["metric"]) == ("base", "run", "exact_match")
    assert comparison["wins"] + comparison["losses"] + comparison["ties"] == 7


def test_json_to_stdout_is_only_json(recipe: Recipe, held_out: Path, base: Path) -> None:
    done = ft("eval", "--model", base, "--data", held_out, "--limit", "2", "--json", "-")
    assert json.loads(done.stdout)["runs"][0]["n"] == 2


def test_loss_equals_a_plain_forward_pass(base: Path, held_out: Path) -> None:
    """Mean negative log-likelihood of answer and end-of-turn tokens, one row at a time through plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.data import dataset

    (target,) = evaluate.find_targets([], None, str(base), None)
    target = evaluate.Target("x", target.model.model_copy(update={"dtype": "float32"}), None, target.data, target.eval)
    rows = dataset.load_eval_rows(str(held_out), target.data)
    result = evaluate.evaluate_target(target, rows)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    total = count = 0.0
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row.messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = encoded["input_ids"].masked_fill(encoded["assistant_masks"] == 0, -100)
        n = int((labels[:, 1:] != -100).sum())
        total += model(encoded["input_ids"], labels=labels).loss.item() * n
        count += n
    assert result.metrics["loss"] == pytest.approx(total / count, abs=1e-5)


def test_batched_generation_equals_one_by_one(base: Path) -> None:
    from finetune import evaluation
    from finetune.data.chat import make_encoder
    from finetune.models import loading
    from finetune.recipe import ModelConfig

    config = ModelConfig(name=str(base))
    model = loading.load_model(config, torch.float32)
    encoder = make_encoder(loading.load_tokenizer(config))
    prompts = [encoder.prompt_ids([{"role": "user", "content": "ab" * n}]) for n in (1, 9, 4, 30, 2)]
    together = evaluation.generate(model, encoder, prompts, 12, batch_size=5)
    alone = [evaluation.generate(model, encoder, [p], 12, batch_size=1)[0] for p in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_recipe_without_a_run_evaluates_the_base(recipe: Recipe, held_out: Path) -> None:
    done = ft("eval", "--recipe", recipe(eval={"data": str(held_out), "max_new_tokens": 4}), "--json", "-")
    assert [run["name"] for run in json.loads(done.stdout)["runs"]] == ["base"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "nothing to evaluate"),
        (("nowhere",), "no such run or adapter"),
        (("--model", "no/such/model", "--data", "builtin:tickets/test"), "no such model"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    done = ft("eval", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_no_held_out_data(recipe: Recipe) -> None:
    run = train(recipe())
    with pytest.raises(UserError, match=r"no held-out data.*--data"):
        evaluate.run([str(run.path)], None, None, None, None, False, None, None)
