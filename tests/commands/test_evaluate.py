"""`ft eval`: figures that can be checked by hand, the base beside the tuned model, JSON for scripts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, ft, train, write_rows

from finetune.commands import evaluate
from finetune.errors import UserError
from finetune.evaluation import measuring, targets
from finetune.evaluation.generation import Evaluation

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
    lines = tmp_path / "rows out.jsonl"
    done = ft("eval", "run", "--compare-base", "--json", file, "--predictions", lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout
    written = json.loads(file.read_text())
    assert [run["name"] for run in written["runs"]] == ["base", "run"]
    base, tuned = (run["metrics"] for run in written["runs"])
    assert written["runs"][0]["n"] == 7
    assert base["perplexity"] == pytest.approx(torch.tensor(base["loss"]).exp().item(), rel=1e-5)
    assert base["loss"] != tuned["loss"]
    assert set(base["fields"]) == {"n"}
    exact, loss = written["comparisons"]
    assert [(c["a"], c["b"], c["metric"]) for c in (exact, loss)] == [
        ("base", "run", "exact_match"),
        ("base", "run", "loss"),
    ]
    assert exact["wins"] + exact["losses"] + exact["ties"] == 7
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    before, after = ([row["loss"] for row in rows if row["run"] == name] for name in ("base", "run"))
    lower = sum(b < a for a, b in zip(before, after, strict=True))
    assert (loss["wins"], loss["losses"], loss["ties"]) == (lower, 7 - lower, 0)
    assert loss["difference"] == pytest.approx(tuned["loss"] - base["loss"]), "of the same tokens"
    assert exact["n"] == loss["n"] == 7
    (kept,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]
    assert (kept["before"], kept["after"], kept["comparisons"]) == (base, tuned, [exact, loss])
    assert sorted(row["row"] for row in kept["rows"]) == list(range(1, 8))
    assert {row["asked"] for row in kept["rows"]} == {"say" * n for n in range(1, 8)}
    assert ft("report", "run", cwd=tmp_path).returncode == 0
    assert "Base and tuned" not in (tmp_path / "run" / "report.html").read_text()
    audit = json.loads((tmp_path / "run" / "data_audit.json").read_text())
    assert (audit["counts"]["rows"], audit["languages"]) == (64, {"en": 64})
    first = audit["preview"][0]
    assert "".join(text for trained, text in first["parts"] if trained) == "0 0<|im_end|>"


def test_json_to_stdout_is_only_json(recipe: Recipe, held_out: Path, base: Path) -> None:
    done = ft("eval", "--model", base, "--data", held_out, "--limit", "2", "--json", "-")
    assert json.loads(done.stdout)["runs"][0]["n"] == 2


def test_loss_equals_a_plain_forward_pass(base: Path, held_out: Path) -> None:
    """Mean negative log-likelihood of answer and end-of-turn tokens, one row at a time through plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.data.held_out import load_eval_rows, rows_of

    (target,) = targets.find_targets([], None, str(base), None)
    target = targets.Target("x", target.model.model_copy(update={"dtype": "float32"}), None, target.data, target.eval)
    rows = load_eval_rows(str(held_out), target.data)
    result = measuring.evaluate_target(target, rows_of(str(held_out), target.data, None))
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
    from finetune.data.chat import make_encoder
    from finetune.evaluation import generation
    from finetune.models import loading, tokenizers
    from finetune.recipe.sections import ModelConfig

    config = ModelConfig(name=str(base))
    model = loading.load_model(config, torch.float32)
    encoder = make_encoder(tokenizers.load_tokenizer(config))
    prompts = [encoder.prompt_ids([{"role": "user", "content": "ab" * n}]) for n in (1, 9, 4, 30, 2)]
    together = generation.generate(model, encoder, prompts, 12, batch_size=5)
    alone = [generation.generate(model, encoder, [p], 12, batch_size=1)[0] for p in prompts]
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
    from finetune.evaluation import generation
    from finetune.metrics import wilson

    def answers(model: object, encoder: object, prompts: list[list[int]], *_: object) -> list[str]:
        return ["never 0", "never 1", "", "", "", "never 5"][: len(prompts)]

    monkeypatch.setattr(generation, "generate", answers)
    data, file = grouped(tmp_path / "rows.jsonl", ["a", "a", 7, 7, "a", None]), tmp_path / "out.json"
    evaluate.run([], model=str(base), data=str(data), json_file=str(file), quantization="none,none")
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


def test_wins_are_of_the_second_model_and_a_metric_is_one_row(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: the first answers row 0 right, the second rows 1 and 2; a toy metric counts characters."""
    from finetune import metrics
    from finetune.evaluation import generation

    written = iter([["never 0", "1", "2", "3"], ["none at all", "never 1", "never 2", "3"]])
    monkeypatch.setattr(generation, "generate", lambda *_: next(written))
    toy = metrics.Metric(
        "characters", ("answers",), lambda row: len(row["prediction"]), metrics.weighted, lower_is_better=True,
        by_group=True,
    )  # fmt: skip
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, toy])
    data, file = grouped(tmp_path / "rows.jsonl", ["a", "a", "b", "b"]), tmp_path / "out.json"
    evaluate.run([], model=str(base), data=str(data), json_file=str(file), quantization="none,none")
    found = json.loads(file.read_text())
    first, second = (run["metrics"] for run in found["runs"])
    assert (first["characters"], second["characters"]) == (10 / 4, 26 / 4)
    assert (first["characters/a"], second["characters/b"]) == (8 / 2, 8 / 2)
    assert second["characters_ci"][0] < 26 / 4 < second["characters_ci"][1]
    compared = {c["metric"]: (c["difference"], c["wins"], c["losses"], c["ties"]) for c in found["comparisons"]}
    assert compared["exact_match"] == (1 / 4, 2, 1, 1)
    assert compared["characters"] == (16 / 4, 0, 3, 1)
    assert compared["characters/a"] == (5.0, 0, 2, 0)
    assert compared["loss"] == (0, 0, 0, 4)
    assert re.search(r"characters +│ +2\.500 \[.*│ +6\.500 \[", capsys.readouterr().out)


def test_groups_and_sampling_stand_in_the_table(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = grouped(tmp_path / "rows.jsonl", ["yes", "no", "yes"])
    evaluate.run([], model=str(base), data=str(data), temperature=0.7, seed=3)
    printed = capsys.readouterr().out
    assert "n=3, temperature 0.7, seed 3" in printed
    assert re.search(r"exact match/no +│ +0.000 \[0.000, 0.793\] n=1 ", printed)  # wilson(0, 1)
    assert re.search(r"exact match/yes +│ +0.000 \[0.000, 0.658\] n=2 ", printed)  # wilson(0, 2)


def test_a_group_may_be_named_by_another_column(tmp_path: Path) -> None:
    from finetune.data.held_out import load_eval_rows
    from finetune.recipe.sections import DataConfig

    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": "a", "topic": topic} for topic in ("x", "", None, ["x"], 0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = load_eval_rows(str(path), DataConfig(train="-", columns={"group": "topic"}))
    assert [row.group for row in named] == ["x", None, None, None, "0"]
    assert [row.group for row in load_eval_rows(str(path))] == [None] * 5


def test_a_column_that_names_rows_is_no_group(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = grouped(tmp_path / "rows.jsonl", [f"row {n}" for n in range(21)])
    evaluate.run([], model=str(base), data=str(data), json_file=str(tmp_path / "out.json"))
    printed = capsys.readouterr()
    assert "has 21 values" in printed.err
    assert "exact match/" not in printed.out


def test_sampled_answers(base: Path) -> None:
    """The same for the same seed, from the whole distribution at its temperature, and greedy by default."""
    from finetune.data.chat import make_encoder
    from finetune.evaluation import generation
    from finetune.models import loading, tokenizers
    from finetune.recipe.sections import ModelConfig

    config = ModelConfig(name=str(base))
    model = loading.load_model(config, torch.float32)
    model.generation_config.top_k, model.generation_config.top_p = 3, 0.5  # a base's own wishes
    encoder = make_encoder(tokenizers.load_tokenizer(config))
    prompt = encoder.prompt_ids([{"role": "user", "content": "ab"}])

    def draw(n: int, **options: float) -> list[str]:
        return generation.generate(model, encoder, [prompt] * n, 6, 8, how=generation.Settings(**options))  # type: ignore[arg-type]

    state = torch.get_rng_state()
    first = draw(12, temperature=1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(12, temperature=1.0, seed=1) == first != draw(12, temperature=1.0, seed=2)
    assert len(set(first)) > 6
    assert draw(2, temperature=1e-4) == draw(2) == [draw(1)[0]] * 2

    drawn = torch.zeros(len(encoder.tokenizer))
    original = generation.as_written
    try:
        generation.as_written = lambda _, ids, __: str(ids[0])  # type: ignore[assignment]
        how = generation.Settings(temperature=0.1, seed=3)
        for token in generation.generate(model, encoder, [prompt] * 4000, 1, 500, how=how):
            drawn[int(token)] += 1
    finally:
        generation.as_written = original
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
        (("nowhere",), "no such run, adapter or model"),
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
        evaluate.run([str(run.path)])


def test_rows_whose_last_turn_is_not_trained_have_no_loss(base: Path, tmp_path: Path) -> None:
    """They count neither as 0 nor as perfect: the loss is that of the other rows alone."""
    from finetune.data.held_out import rows_of

    def row(number: int, **more: object) -> dict[str, object]:
        answer = {"role": "assistant", "content": f"answer {number}", **more}
        return {"messages": [{"role": "user", "content": f"q {number}"}, answer]}

    (target,) = targets.find_targets([], None, str(base), None)
    target = targets.Target("x", target.model, None, target.data, target.eval.model_copy(update={"max_new_tokens": 2}))

    def measured(*rows: dict[str, object]) -> Evaluation:
        path = write_rows(tmp_path / "rows.jsonl", list(rows))
        return measuring.evaluate_target(target, rows_of(str(path), target.data, None))

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
    evaluate.run([str(run)], data=str(rows), compare_base=True, limit=8, json_file=str(file))
    base, tuned = (result["metrics"] for result in json.loads(file.read_text())["runs"])
    assert tuned["trained_on"] == 8
    assert "trained_on" not in base
    shown = capsys.readouterr().out
    assert "run was trained on 8 of these 8 rows: its figures are not held-out" in shown
    assert "held-out, n=" not in shown
    evaluate.run([str(run)], data=str(held_out), limit=2, json_file=str(file))
    assert json.loads(file.read_text())["runs"][0]["metrics"]["trained_on"] == 0
    assert "held-out, n=2" in capsys.readouterr().out


WISHES = [
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 9},
    {"suppress_tokens": list(range(3, 200))},
    {"begin_suppress_tokens": list(range(3, 200))},
    {"bad_words_ids": [[i] for i in range(3, 200)]},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 2},
    {"sequence_bias": [[[40], 50.0]]},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_return_sequences": 1, "return_dict_in_generate": True, "output_scores": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"do_sample": True, "temperature": 3.0, "top_p": 0.5},
    {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0}},
    {"exponential_decay_length_penalty": [1, 50.0]},
    {"max_length": 3, "max_time": 1e-9},
    {"guidance_scale": 3.0},
    {"stop_strings": ["a"]},
    {"prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("wishes", WISHES, ids=lambda wishes: next(iter(wishes)))
@pytest.mark.parametrize("adapted", [False, True])
def test_greedy_obeys_nothing_but_the_model(
    base: Path, tmp_path: Path, wishes: dict[str, object], adapted: bool
) -> None:
    """The tokens are those of argmax, whatever the base's generation_config.json asks for; a run says what it asked."""
    from peft import LoraConfig, get_peft_model

    from finetune.data.chat import make_encoder
    from finetune.evaluation import generation
    from finetune.models import loading, tokenizers
    from finetune.recipe.sections import ModelConfig

    folder = Path(shutil.copytree(base, tmp_path / "base"))
    (folder / "generation_config.json").write_text(json.dumps({**wishes, "eos_token_id": 2}))
    config = ModelConfig(name=str(folder))
    model = loading.load_model(config, torch.float32)
    encoder = make_encoder(tokenizers.load_tokenizer(config))
    prompt = ids = encoder.prompt_ids([{"role": "user", "content": "aaaa"}])
    while len(ids) < len(prompt) + 8 and ids[-1] != 2:
        with torch.inference_mode():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    whole = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model  # starts as the base
    output = generation.answer(whole, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long), 8, [2], 0)
    assert output[0].tolist() == ids
    assert set(generation.not_followed(whole)) == wishes.keys() - {"max_length"}


def measured(tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    """Runs of `ft eval` in this process."""
    runs, options = arguments[0], dict(arguments[1]) if len(arguments) > 1 else {}  # type: ignore[call-overload]
    file = tmp_path / "measured.json"
    values = {"recipe": None, "model": None, "adapter": None, "data": None, "compare_base": False, "limit": None}
    evaluate.run(runs, **{**values, **options}, json_file=str(file))  # type: ignore[arg-type]
    found: list[dict[str, Any]] = json.loads(file.read_text())["runs"]
    return found


def test_a_full_run_is_compared_with_its_base(recipe: Recipe, base: Path, held_out: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    section = {"data": str(held_out), "max_new_tokens": 2}
    run = train(full_recipe(recipe, other, section))
    before, after = measured(tmp_path, [str(run.path)], {"compare_base": True})
    (bare,) = measured(tmp_path, [], {"model": str(other), "data": str(held_out)})
    assert (before["name"], after["name"]) == ("base", "run")
    assert before["metrics"]["loss"] == pytest.approx(bare["metrics"]["loss"], abs=1e-3)
    assert after["metrics"]["loss"] < before["metrics"]["loss"] - 0.01

    moved = other.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"--model: was trained on .*other, which is no longer there"):
        evaluate.run([str(run.path)], compare_base=True)
    again, _ = measured(tmp_path, [str(run.path)], {"compare_base": True, "model": str(moved)})
    assert again["metrics"]["loss"] == before["metrics"]["loss"]
    with pytest.raises(UserError, match="--model: is a full fine-tuning"):
        evaluate.run([str(run.path)], model=str(moved))
    with pytest.raises(UserError, match="has no base to compare with"):
        evaluate.run([], model=str(moved), data=str(held_out), compare_base=True)


def full_recipe(recipe: Recipe, base: Path, section: dict[str, object]) -> Path:
    import yaml

    path = recipe(model={"name": str(base)}, eval=section)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": {"method": "full"}}))
    return path


@pytest.mark.parametrize("full", [False, True])
def test_the_locked_template_wins(recipe: Recipe, base: Path, held_out: Path, tmp_path: Path, full: bool) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    section = {"data": str(held_out), "max_new_tokens": 2}
    path = full_recipe(recipe, base, section) if full else recipe(eval=section)
    run = train(path, f"model.chat_template={template}")
    before = measured(tmp_path, [str(run.path)], {"compare_base": True})
    for text in (CHATML, None):
        template.write_text(text) if text else template.unlink()
        after = measured(tmp_path, [str(run.path)], {"compare_base": True})
        assert [r["metrics"]["loss"] for r in after] == [r["metrics"]["loss"] for r in before]


def test_an_edited_recipe_says_what_is_evaluated(
    recipe: Recipe, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(eval={"data": str(held_out), "max_new_tokens": 2}))
    (tmp_path / "other.jsonl").write_text("".join(held_out.read_text().splitlines(keepends=True)[:2]))
    edited = recipe(eval={"data": str(tmp_path / "oth*.jsonl"), "max_new_tokens": 3})
    (found,) = measured(tmp_path, [], {"recipe": str(edited)})
    assert (found["n"], found["generation"]["max_new_tokens"]) == (2, 3)
    assert "eval.max_new_tokens 3, as the recipe says now; the run had 2" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="exclude each other"):
        evaluate.run(["run"], recipe=str(edited))


def test_a_relative_glob_is_found_from_any_folder(
    recipe: Recipe, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a [project]"
    place.mkdir()
    for number, line in enumerate(held_out.read_text().splitlines()[:3]):
        (place / f"part{number}.jsonl").write_text(line + "\n")
    monkeypatch.chdir(place)
    run = train(recipe(eval={"data": "part*.jsonl", "max_new_tokens": 2}))
    assert measured(tmp_path, [], {"recipe": str(tmp_path / "recipe.yaml")})[0]["n"] == 3
    monkeypatch.chdir("/")
    assert measured(tmp_path, [str(run.path)])[0]["n"] == 3


def test_files_with_little_in_them(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, one, asked = (tmp_path / f"{name}.jsonl" for name in ("empty", "one", "asked"))
    empty.write_text("")
    one.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    options = {"model": str(base), "limit": None, "quantization": "none,none"}
    with pytest.raises(UserError, match="the file is empty"):
        measured(tmp_path, [], {**options, "data": str(empty)})
    assert measured(tmp_path, [], {**options, "data": str(one)})[0]["metrics"]["loss"] > 0
    capsys.readouterr()
    (found, _) = measured(tmp_path, [], {**options, "data": str(asked)})
    assert set(found["metrics"]) == {"tokens_per_second", "weights_gb"}
    printed = capsys.readouterr()
    assert "no row has a reference answer" in printed.err
    assert "exact match" not in printed.out
    asked.write_text(asked.read_text() + "\n" + one.read_text())
    evaluate.run([], model=str(base), data=str(asked), json_file=str(tmp_path / "o.json"), quantization="none,none")
    assert {c["ties"] for c in json.loads((tmp_path / "o.json").read_text())["comparisons"]} == {1}
