"""`ft eval`: figures that can be checked by hand, the base beside the tuned model, JSON for scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ft, train, write_rows

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


def grouped(path: Path, groups: list[object]) -> Path:
    """Rows with answers that no random model gives, in these groups; None is no group."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"never {n}"}],
            **({} if group is None else {"group": group}),
        }
        for n, group in enumerate(groups)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_have_metrics_intervals_and_comparisons_of_their_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures by hand: of group a two of three are right, of group 7 none of two, and one row has no group."""
    from finetune import evaluation
    from finetune.metrics import wilson

    def answers(model: object, encoder: object, prompts: list[list[int]], *_: object) -> list[str]:
        return ["never 0", "never 1", "", "", "", "never 5"][: len(prompts)]

    monkeypatch.setattr(evaluation, "generate", answers)
    data, file = grouped(tmp_path / "rows.jsonl", ["a", "a", 7, 7, "a", None]), tmp_path / "out.json"
    evaluate.run([], None, str(base), None, str(data), False, None, str(file), "none,none")
    written = json.loads(file.read_text())
    found = written["runs"][0]["metrics"]
    assert found["exact_match"] == pytest.approx(3 / 6)
    assert found["exact_match/a"] == pytest.approx(2 / 3)
    assert found["exact_match/a_ci"] == pytest.approx(list(wilson(2, 3)))
    assert found["exact_match/7"] == 0
    assert found["groups"] == {"7": 2, "a": 3}
    assert "temperature" not in written
    compared = {c["metric"]: c["ties"] for c in written["comparisons"]}
    assert compared == {"exact_match": 6, "exact_match/7": 2, "exact_match/a": 3, "loss": 6}


def test_groups_and_sampling_stand_in_the_table(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = grouped(tmp_path / "rows.jsonl", ["yes", "no", "yes"])
    evaluate.run([], None, str(base), None, str(data), False, None, None, temperature=0.7, seed=3)
    printed = capsys.readouterr().out
    assert "n=3, temperature 0.7, seed 3" in printed
    assert re.search(r"exact match/no +│ 0.000 \[0.000, 0.793\]", printed)  # wilson(0, 1)
    assert re.search(r"exact match/yes +│ 0.000 \[0.000, 0.658\]", printed)  # wilson(0, 2)


def test_a_group_may_be_named_by_another_column(tmp_path: Path) -> None:
    from finetune.data import dataset
    from finetune.recipe import DataConfig

    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": "a", "topic": topic} for topic in ("x", "", None, ["x"], 0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = dataset.load_eval_rows(str(path), DataConfig(train="-", columns={"group": "topic"}))
    assert [row.group for row in named] == ["x", None, None, None, "0"]
    assert [row.group for row in dataset.load_eval_rows(str(path))] == [None] * 5


def test_a_column_that_names_rows_is_no_group(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = grouped(tmp_path / "rows.jsonl", [f"row {n}" for n in range(21)])
    evaluate.run([], None, str(base), None, str(data), False, None, str(tmp_path / "out.json"))
    printed = capsys.readouterr()
    assert "has 21 values" in printed.err
    assert "exact match/" not in printed.out


def test_sampled_answers(base: Path) -> None:
    """The same for the same seed, from the whole distribution at its temperature, and greedy by default."""
    from finetune import evaluation
    from finetune.data.chat import make_encoder
    from finetune.models import loading
    from finetune.recipe import ModelConfig

    config = ModelConfig(name=str(base))
    model = loading.load_model(config, torch.float32)
    model.generation_config.top_k, model.generation_config.top_p = 3, 0.5  # a base's own wishes
    encoder = make_encoder(loading.load_tokenizer(config))
    prompt = encoder.prompt_ids([{"role": "user", "content": "ab"}])

    def draw(n: int, **options: float) -> list[str]:
        return evaluation.generate(model, encoder, [prompt] * n, 6, 8, **options)  # type: ignore[arg-type]

    state = torch.get_rng_state()
    first = draw(12, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(12, temperature=1.0, seed=1) == first != draw(12, temperature=1.0, seed=2)
    assert len(set(first)) > 6
    assert draw(2, temperature=1e-4) == draw(2) == [draw(1)[0]] * 2

    drawn = torch.zeros(len(encoder.tokenizer))
    original = evaluation.decode
    try:
        evaluation.decode = lambda _, ids, __: str(ids[0])  # type: ignore[assignment]
        for token in evaluation.generate(model, encoder, [prompt] * 4000, 1, 500, temperature=0.1, seed=3):
            drawn[int(token)] += 1
    finally:
        evaluation.decode = original
    with torch.inference_mode():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / 0.1).softmax(-1)
    assert (expected > 1e-4).sum() > 3
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((drawn / 4000 - expected).abs() < 5 * error + 1e-3).all()


def test_temperature_and_seed_from_the_command_line(base: Path, held_out: Path) -> None:
    common = ("eval", "--model", base, "--data", held_out, "--limit", "1", "--json", "-")
    written = json.loads(ft(*common, "--temperature", "0.7", "--seed", "5").stdout)
    assert (written["temperature"], written["seed"]) == (0.7, 5)
    assert ft(*common, "--temperature", "-1").returncode == 2


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


def test_rows_whose_last_turn_is_not_trained_have_no_loss(base: Path, tmp_path: Path) -> None:
    """They count neither as 0 nor as perfect: the loss is that of the other rows alone."""
    from finetune.data import dataset

    def row(number: int, **more: object) -> dict[str, object]:
        answer = {"role": "assistant", "content": f"answer {number}", **more}
        return {"messages": [{"role": "user", "content": f"q {number}"}, answer]}

    (target,) = evaluate.find_targets([], None, str(base), None)
    target = evaluate.Target("x", target.model, None, target.data, target.eval.model_copy(update={"max_new_tokens": 2}))

    def measured(*rows: dict[str, object]) -> evaluate.Evaluation:
        path = write_rows(tmp_path / "rows.jsonl", list(rows))
        return evaluate.evaluate_target(target, dataset.load_eval_rows(str(path), target.data))

    alone, mixed = measured(row(1)), measured(row(1), row(2, train=False), row(3, weight=0))
    assert mixed.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    assert mixed.losses == pytest.approx(alone.losses, rel=1e-4)
    assert (mixed.n, mixed.metrics["rows_without_loss"]) == (3, 2)
    none = measured(row(1, train=False))
    assert "loss" not in none.metrics
    assert "perplexity" not in none.metrics
    assert none.losses == []


def test_a_run_on_its_own_training_rows_is_not_called_held_out(
    recipe: Recipe, rows: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = train(recipe(eval={"max_new_tokens": 2})).path, tmp_path / "eval.json"
    evaluate.run([str(run)], None, None, None, str(rows), True, 8, str(file))
    base, tuned = (result["metrics"] for result in json.loads(file.read_text())["runs"])
    assert tuned["trained_on"] == 8
    assert "trained_on" not in base
    shown = capsys.readouterr().out
    assert "run was trained on 8 of these 8 rows: its figures are not held-out" in shown
    assert "held-out, n=" not in shown
    evaluate.run([str(run)], None, None, None, str(held_out), False, 2, str(file))
    assert json.loads(file.read_text())["runs"][0]["metrics"]["trained_on"] == 0
    assert "held-out, n=2" in capsys.readouterr().out
