"""`ft eval --tasks`: lm-evaluation-harness on a local task, with our loading and the adapter on."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ft, train, write_rows

from finetune.data.choices import LETTERS, Choice
from finetune.evaluation.choices import block, intro

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not here")
warned = pytest.mark.filterwarnings("default")  # the harness's own
OPTIONS = ("two", "three", "a ticket", "the moon")


def task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> Path:
    """A task's folder, whose YAML names its data as it lies beside it."""
    folder.mkdir(parents=True)
    write_rows(folder / "rows.jsonl", rows)
    values = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "doc_to_text": "{{text}}", **config,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture(params=["tiny-llama", "tiny-chatglm3"])
def run(request: pytest.FixtureRequest, recipe: Callable[..., Path]) -> Path:
    """A run on a built-in base, far from it. The chat format of one is a template, that of the other is none."""
    settings = {"max_steps": 2, "learning_rate": 0.02}
    found: Path = train(recipe(model={"name": request.param, "dtype": "float32"}, train=settings)).path
    return found


def as_json(*arguments: Any, cwd: Path) -> dict[str, Any]:
    said = ft("eval", *arguments, "--json", "-", "--show", "0", cwd=cwd)
    assert said.returncode == 0, said.stderr
    found: dict[str, Any] = json.loads(said.stdout)
    return found


@harness
@warned
def test_the_accuracy_is_ours_on_the_same_file(run: Path, tmp_path: Path) -> None:
    """Multiple choice and generated answers, of base and run; from another folder, offline."""
    csv, rows = ["id,question,A,B,C,D,answer"], []
    for i in range(24):
        options = OPTIONS[i % 4 :] + OPTIONS[: i % 4]
        asked = Choice(f"What is number {i * 7}?", options, i % 3, "mmlu", "things")
        csv.append(",".join([str(i), asked.text, *options, LETTERS[i % 3]]))
        rows.append({"text": intro(asked, True) + block(asked, True), "options": [*LETTERS[:4]], "gold": i % 3})
    (tmp_path / "things_test.csv").write_text("\n".join(csv) + "\n", encoding="utf-8")
    folder = task(
        tmp_path / "my tasks", "things", rows, output_type="multiple_choice", doc_to_choice="{{options}}",
        doc_to_target="gold", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ours = as_json(run, "--compare-base", "--data", tmp_path / "things_test.csv", "--shots", "0", cwd=elsewhere)
    theirs = as_json(run, "--compare-base", "--tasks", folder, cwd=elsewhere)
    shares = [one["metrics"]["choice_accuracy"] for one in ours["runs"]]
    figures = [one["tasks"]["things"] for one in theirs["runs"]]
    assert [one["acc"] for one in figures] == shares
    assert 0 < shares[0] < 1
    for figure, share in zip(figures, shares, strict=True):
        assert figure["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 23))
        assert (figure["n"], figure["shots"]) == (24, 0)
    assert [one["generation"] for one in theirs["runs"]] == [{"chat_template": True}] * 2
    (change,) = theirs["comparisons"]
    assert (change["metric"], change["n"]) == ("things/acc", 24)
    assert change["difference"] == pytest.approx(shares[1] - shares[0])


@harness
@warned
def test_generated_answers_are_ours(run: Path, tmp_path: Path) -> None:
    """The references are what the run writes, in three rows of five; its answers end where ours do."""
    asked = [{"prompt": f"say {i}", "completion": "?"} for i in range(5)]
    first, predictions = write_rows(tmp_path / "first.jsonl", asked), tmp_path / "predictions.jsonl"
    as_json(run, "--data", first, "--predictions", predictions, "--metrics", "exact_match", cwd=tmp_path)
    answers = [json.loads(line)["prediction"] for line in predictions.read_text().splitlines()]
    rows = [{**row, "completion": answers[i].strip() if i < 3 else "no"} for i, row in enumerate(asked)]
    ours = as_json(run, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--metrics", "exact_match", cwd=tmp_path)
    docs = [{"text": row["prompt"], "answer": row["completion"]} for row in rows]
    folder = task(
        tmp_path / "tasks", "written", docs, output_type="generate_until", doc_to_target="{{answer}}",
        generation_kwargs={"until": [], "max_gen_toks": 256},
        filter_list=[{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    said = ft("eval", run, "--tasks", folder / "written.yaml", "--json", tmp_path / "out.json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "asked with the chat template" in said.stdout
    assert "0.600 ± 0.2" in said.stdout
    found = json.loads((tmp_path / "out.json").read_text())["runs"][0]["tasks"]["written"]
    assert found["exact_match"] == ours["runs"][0]["metrics"]["exact_match"] == 3 / 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", " , "], "--tasks: names no task"),
        (["--tasks", "x", "--data", "rows.jsonl"], "--data"),
        (["--tasks", "x", "--seed", "0"], "--seed: has no effect: --tasks hands over"),
        (["--tasks", "x", "--temperature", "0"], "--temperature: has no effect"),
        (["--tasks", "{tmp}/gone"], "--tasks: no such task"),
        (["--tasks", "{tmp}/empty"], "--tasks: defines no task"),
        (["--tasks", "{tmp}/broken"], "cannot be read"),
        (["--tasks", "{tmp}/gone,things", "--metrics", "bleu"], "--tasks: no such task"),
    ],
)
@harness
@warned
def test_tasks_that_cannot_be(base: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    task(tmp_path / "broken", "broken", [{"text": "a"}], output_type="multiple_choice", test_split="nowhere")
    found = ft("eval", "--model", base, *(part.format(tmp=tmp_path) for part in arguments))
    assert found.returncode == 2, found.stderr + found.stdout
    assert said in found.stderr
    assert "loading" not in found.stderr


def test_what_is_missing_is_named_before_anything_is_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    found = ft("eval", "--model", base, "--tasks", "arc_easy")
    assert found.returncode == 2
    assert "--tasks: lm-evaluation-harness is not installed → pip install 'ft-recipes[bench]'" in found.stderr
