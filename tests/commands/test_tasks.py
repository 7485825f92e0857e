"""`ft eval --tasks`: lm-evaluation-harness on a local task, with our loading and the adapter on."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ft, train, write_rows

from finetune.data.choices import LETTERS, Choice
from finetune.evaluation.choices import block, intro
from finetune.evaluation.harness_tasks import check, load, names_in

harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not here")
warned = pytest.mark.filterwarnings("default")  # the harness's own
CHOICES = {
    "output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
WRITTEN = {
    "output_type": "generate_until", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
}  # fmt: skip
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


def questions(folder: Path) -> tuple[Path, Path]:
    """(a csv file of 24 questions, a task's folder with the same)"""
    csv, rows = ["id,question,A,B,C,D,answer"], []
    for i in range(24):
        options = OPTIONS[i % 4 :] + OPTIONS[: i % 4]
        asked = Choice(f"What is number {i * 7}?", options, i % 3, "mmlu", "things")
        csv.append(",".join([str(i), asked.text, *options, LETTERS[i % 3]]))
        rows.append({"text": intro(asked, True) + block(asked, True), "options": [*LETTERS[:4]], "gold": i % 3})
    file = folder / "things_test.csv"
    file.write_text("\n".join(csv) + "\n", encoding="utf-8")
    return file, task(folder / "my tasks", "things", rows, **CHOICES)


@harness
@warned
def test_the_accuracy_is_ours_on_the_same_file(run: Path, tmp_path: Path) -> None:
    """Multiple choice and generated answers, of base and run; from another folder, offline."""
    file, folder = questions(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ours = as_json(run, "--compare-base", "--data", file, "--shots", "0", cwd=elsewhere)
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
@pytest.mark.parametrize(("method", "rate"), [("bottleneck", 0.03), ("prompt_tuning", 1.0)])
def test_the_accuracy_is_ours_in_int4_and_with_other_adapters(
    recipe: Callable[..., Path], tmp_path: Path, method: str, rate: float
) -> None:
    """Our own layers, and virtual tokens before the text, on quantized weights; each question, too."""
    settings = {"max_steps": 3, "learning_rate": rate}
    path = recipe(model={"name": "tiny-llama", "dtype": "float32"}, train=settings)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": {"method": method}}))
    run = train(path).path
    file, folder = questions(tmp_path)
    ways = ("--compare-base", "--quantization", "int4")
    ours = as_json(run, *ways, "--data", file, "--shots", "0", cwd=tmp_path)
    theirs = as_json(run, *ways, "--tasks", folder.name, cwd=tmp_path)
    shares = [one["metrics"]["choice_accuracy"] for one in ours["runs"]]
    assert [one["tasks"]["things"]["acc"] for one in theirs["runs"]] == shares
    assert len(shares) == 2
    counted = ("a", "b", "wins", "losses", "ties")
    same, changed = ([[item[key] for key in counted] for item in found["comparisons"]] for found in (ours, theirs))
    assert changed == same
    assert any(wins + losses for _, _, wins, losses, _ in changed), "not the same answer everywhere"


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
        (["--tasks", "x", "--show", "9"], "--show: has no effect"),
        (["--tasks", "{tmp}/gone"], "--tasks: no such task"),
        (["--tasks", "{tmp}/empty"], "--tasks: defines no task"),
        (["--tasks", "{tmp}/broken"], "cannot be read"),
        (["--tasks", "{tmp}/gone,things", "--metrics", "bleu"], "--tasks: no such task"),
        (["--tasks", "{tmp}/none"], "none cannot be read: its data has no rows"),
        (["--tasks", "{tmp}/half"], "bad.yaml cannot be read: ParserError"),
        (["--tasks", "{tmp}/other"], "t.yml: --tasks: the harness reads only .yaml"),
        (["--tasks", "{tmp}/t,{tmp}/u"], "--tasks: two tasks are called t"),
        (["--tasks", "{tmp}/t,{tmp}/t/t.yaml"], "--tasks: two tasks are called t"),
        (["--tasks", "{tmp}/unsafe"], "--tasks: unsafe runs code that the model writes"),
        (["--tasks", "{tmp}/long"], "--tasks: long lets 512 tokens be written, and {base} was made for 512"),
        (["--tasks", "{tmp}/zero", "--shots", "2"], "--shots: zero has num_fewshot: 0"),
        (["--tasks", "{tmp}/t", "--shots", "3"], "--shots: t cannot be asked with 3 examples: ValueError"),
        (["--tasks", "{tmp}/many"], "--tasks: many cannot be asked with 5 examples"),
        (["--model", "tiny-chatglm3", "--tasks", "{tmp}/begun"], "--tasks: begun begins the assistant's answer"),
    ],
)
@harness
@warned
def test_tasks_that_cannot_be(base: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    """Nothing of it costs the time that a model takes to load."""
    (tmp_path / "empty").mkdir()
    task(tmp_path / "broken", "broken", [{"text": "a"}], output_type="multiple_choice", test_split="nowhere")
    rows = [{"text": f"say {i}", "answer": str(i)} for i in range(3)]
    for folder in ("t", "u"):
        task(tmp_path / folder, "t", rows, **WRITTEN)
    long = {**WRITTEN, "generation_kwargs": {"until": [], "max_gen_toks": 512}}
    task(tmp_path / "long", "long", rows, **long)
    task(tmp_path / "unsafe", "unsafe", rows, unsafe_code=True, **WRITTEN)
    task(tmp_path / "zero", "zero", rows, num_fewshot=0, **WRITTEN)
    task(tmp_path / "many", "many", rows, num_fewshot=5, **WRITTEN)
    task(tmp_path / "begun", "begun", rows, gen_prefix="It is", **WRITTEN)
    task(tmp_path / "none", "none", [], **WRITTEN)
    task(tmp_path / "half", "good", rows, **WRITTEN)
    (tmp_path / "half" / "bad.yaml").write_text("task: bad\nmetric_list: [a\n: b")
    (tmp_path / "half" / "recipe.yaml").write_text("stage: sft\n: [")  # none of the harness's
    task(tmp_path / "other", "t", rows, **WRITTEN)
    (tmp_path / "other" / "t.yaml").rename(tmp_path / "other" / "t.yml")
    said, models = said.format(base=base.name), [] if "--model" in arguments else ["--model", base]
    found = ft("eval", *models, *(part.format(tmp=tmp_path) for part in arguments))
    assert found.returncode == 2, found.stderr + found.stdout
    assert said in found.stderr
    assert "loading" not in found.stderr


@harness
@warned
def test_what_stands_behind_the_thinking_is_the_answer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two written answers one ends inside its thinking."""
    import torch
    import trl
    from lm_eval.models.huggingface import HFLM

    shutil.copytree(base, tmp_path / "base")
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    (tmp_path / "base" / "chat_template.jinja").write_text(template, encoding="utf-8")

    def writes(self: Any, context: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        texts = ["<think>\nhm 5\n</think>\n\n7", "<think>\n7\n7\n7\n7\n7\n7"]
        ids = [self.tokenizer.encode(text)[:24] for text in texts]
        return torch.cat([context, torch.tensor([row + [0] * (24 - len(row)) for row in ids])], 1)

    monkeypatch.setattr(HFLM, "_model_generate", writes)
    rows = [{"text": f"say {i}", "answer": answer} for i, answer in enumerate(("7", ""))]
    settings = {**WRITTEN, "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24}}
    folder = task(tmp_path / "t", "t", rows, **settings)
    found = as_json("--model", tmp_path / "base", "--tasks", folder, "--thinking", "on", cwd=tmp_path)
    assert found["runs"][0]["tasks"]["t"]["exact_match"] == 1


@harness
@warned
def test_what_chatglm_puts_before_a_text_is_not_scored(tmp_path: Path) -> None:
    """Its two tokens stand there by rule: no text makes them probable."""
    text = "the ticket says that the printer on the third floor is out of paper"
    file = write_rows(tmp_path / "text.jsonl", [{"text": text}])
    folder = task(
        tmp_path / "t", "t", [{"text": text}], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    predictions = tmp_path / "predictions.jsonl"
    as_json("--model", "tiny-chatglm3", "--data", file, "--predictions", predictions, cwd=tmp_path)
    ours = json.loads(predictions.read_text())
    theirs = as_json("--model", "tiny-chatglm3", "--tasks", folder, cwd=tmp_path)["runs"][0]["tasks"]["t"]
    nats = math.log(theirs["byte_perplexity"]) * len(text)
    assert nats == pytest.approx(ours["loss"] * ours["tokens"], rel=0.1)


@harness
@warned
def test_a_folder_is_measured_whole(tmp_path: Path) -> None:
    """Groups in groups, and the tasks that are in none."""
    rows = [{"text": f"say {i}", "answer": str(i)} for i in range(3)]
    folder = tmp_path / "all"
    for name in ("a", "b", "alone"):
        task(folder / name, name, rows, **WRITTEN)
        (folder / name / "rows.jsonl").rename(folder / "rows.jsonl")
    (folder / "inner.yaml").write_text("group: inner\ntask: [a]\n")
    (folder / "outer.yaml").write_text("group: outer\ntask: [inner, b]\n")
    assert sorted(map(names_in, load([str(folder)]))) == [["alone"], ["outer", "inner", "a", "b"]]


@harness
@warned
def test_examples_never_hold_the_question(tmp_path: Path) -> None:
    """The harness draws them from the test rows where a task has no others."""
    rows = [{"text": f"say {i}.", "answer": str(i)} for i in range(4)]
    folder = task(tmp_path / "t", "t", rows, **WRITTEN)
    (asked,) = load([str(folder)])
    check([asked], "a model", 512, 3, True)
    for seed in range(5):
        asked.set_fewshot_seed(seed=seed)
        prompts = [asked.fewshot_context(row, 3) for row in asked.eval_docs]
        assert [[prompt.count(row["text"]) for row in rows] for prompt in prompts] == [[1] * 4] * 4


@harness
@warned
def test_what_the_harness_warns_of_is_told_and_what_a_task_raises_is_a_line(base: Path, tmp_path: Path) -> None:
    rows = [{"text": "word " * 600, "answer": str(i)} for i in range(2)]
    cut = task(tmp_path / "cut", "cut", rows, **WRITTEN)
    options = [{"text": f"say {i}", "options": ["a", "b"], "gold": 7} for i in range(3)]
    wrong = task(tmp_path / "wrong", "wrong", options, **{**CHOICES, "doc_to_target": "c"})
    said = ft("eval", "--model", base, "--tasks", f"{cut},{wrong}")
    assert said.returncode == 0, said.stderr
    assert "Left truncation applied" in said.stderr
    assert "Label index was not in within range of available choices" in said.stderr
    assert "(3 times)" in said.stderr
    assert "git" not in said.stderr
    raising = task(tmp_path / "raising", "raising", rows, **{**WRITTEN, "metric_list": None})
    (raising / "own.py").write_text("def scored(doc, results):\n    raise ValueError('boom')\n")
    with (raising / "raising.yaml").open("a") as file:
        file.write("process_results: !function own.scored\n")
    said = ft("eval", "--model", base, "--tasks", raising)
    assert said.returncode == 1
    assert "own.py, line 2, in scored: ValueError: boom" in said.stderr
    assert "this is a bug" not in said.stderr


def test_what_is_missing_is_named_before_anything_is_loaded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    found = ft("eval", "--model", base, "--tasks", "arc_easy")
    assert found.returncode == 2
    assert "--tasks: lm-evaluation-harness is not installed → pip install 'ft-recipes[bench]'" in found.stderr
