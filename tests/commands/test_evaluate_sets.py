"""Several held-out sets: a table each, what was forgotten, changed, leaked; evaluations that go on, and memory."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train, write_rows

from finetune.commands import evaluate
from finetune.data.held_out import rows_of
from finetune.data.samples import read_samples
from finetune.data.types import Conversation
from finetune.errors import Interrupted, UserError
from finetune.evaluation import comparisons, continuous, generation, kept, measuring, parts, targets
from finetune.evaluation.sets import Part, leaks_of
from finetune.metrics import METRICS
from finetune.recipe.file import load
from finetune.recipe.sections import HeldSet

Recipe = Callable[..., Path]


def sums(path: Path, numbers: range, answer: str = "never {}") -> Path:
    return write_rows(path, [{"prompt": f"say {n}", "answer": answer.format(n)} for n in numbers])


def answered(monkeypatch: pytest.MonkeyPatch, *answers: Callable[[int], str]) -> None:
    """The models answer, one after the other, as these functions of the row's number say."""
    calls = iter(answers)

    def fake(model: object, encoder: object, prompts: list[list[int]], *_: object) -> list[str]:
        says = next(calls)
        return [says(i) for i in range(len(prompts))]

    monkeypatch.setattr(generation, "generate", fake)


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> Path:
    """A run with a set of its own and a general one, whose recipe names them."""
    own, general = sums(tmp_path / "own rows.jsonl", range(6)), sums(tmp_path / "general.jsonl", range(30))
    section = {"data": {"mine": str(own), "old": {"path": str(general), "general": True}}, "max_new_tokens": 2}
    path: Path = train(recipe(eval=section)).path
    return path


def measured(file: Path, *runs: Path, **options: Any) -> dict[str, Any]:
    evaluate.run([str(run) for run in runs], json_file=str(file), **options)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_each_set_has_a_table_and_a_loss_on_a_general_one_is_warned_of(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is measured on the watched set alone; 20 of its 30 right answers are wrong after the training."""
    answered(monkeypatch, lambda i: f"never {i}", lambda i: "", lambda i: f"never {i}" if i < 10 else "")
    lines = tmp_path / "lines.jsonl"
    found = measured(tmp_path / "o.json", run, predictions=str(lines), named=["exact_match"], show_changes=2)
    own, old = found["sets"]
    assert [(one["name"], [r["n"] for r in one["runs"]]) for one in (own, old)] == [("mine", [6]), ("old", [30])]
    assert own["comparisons"] == []
    (lost,) = old["forgotten"]
    assert (lost["a"], lost["b"], lost["metric"], lost["losses"], lost["n"]) == ("base", "run", "exact_match", 20, 30)
    assert old["comparisons"] == [lost]
    (changed,) = old["changes"]
    assert (changed["worse"], changed["better"], len(changed["rows"])) == (20, 0, 2)
    first = changed["rows"][0]
    assert (first["row"], first["reference"]) == (11, "never 10")
    assert (first["a"]["prediction"], first["b"]["prediction"]) == ("never 10", "")
    said = capsys.readouterr()
    assert "right with base, wrong with run (exact match): 20 of 30 rows, 2 of them" in said.out
    assert re.search(
        "warning: old: run has lost something it is not trained for: exact match -0.667 .* against base", said.err
    )
    assert [json.loads(line)["set"] for line in lines.read_text().splitlines()] == ["mine"] * 6 + ["old"] * 30

    answered(monkeypatch, lambda i: f"never {i}", lambda i: "", lambda i: "" if i == 3 else f"never {i}")
    assert measured(tmp_path / "o.json", run, named=["exact_match"])["sets"][1]["forgotten"] == [], (
        "within the interval"
    )
    assert "lost something" not in capsys.readouterr().err


def test_a_general_set_without_a_base_says_what_is_missing(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune.evaluation.sets import bases_of_each

    (target,) = targets.find_targets([str(run)], None, None, None)
    assert [one and one.name for one in bases_of_each([target], [target])] == ["base"]
    (bare,) = targets.find_targets([], None, str(base), None)
    assert bases_of_each([bare], [bare]) == [None]
    assert capsys.readouterr().err == ""
    import dataclasses

    assert bases_of_each([dataclasses.replace(target, base=None)], []) == [None]
    assert "what run has forgotten is not known: run has no base to compare with" in capsys.readouterr().err


def test_sets_of_the_command_line_and_what_is_measured_on_each(run: Path, base: Path, tmp_path: Path) -> None:
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"prompt": f"{n}?", "answer": f"#### {n}"} for n in range(3)])
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "chosen": "yes yes", "rejected": "no"} for n in range(3)]
    )
    data = [f"sums={numbers}", str(pairs)]
    options = {"data": data, "named": ["number_match", "preference_accuracy", "loss"], "limit": 2}
    first, second = measured(tmp_path / "o.json", run, base, **options)["sets"]
    assert [(one["name"], one["data"]) for one in (first, second)] == [
        ("sums", str(numbers)),
        ("pairs.jsonl", str(pairs)),
    ]
    assert [r["name"] for r in first["runs"]] == ["run", "random-llama"]
    assert {"number_match", "loss"} <= first["runs"][0]["metrics"].keys()
    assert "preference_accuracy" not in first["runs"][0]["metrics"]
    assert {"preference_accuracy", "loss"} <= second["runs"][0]["metrics"].keys()
    with pytest.raises(UserError, match="number_match is measured on answers, and these rows are pairs"):
        evaluate.run([str(run)], data=data, named=["number_match", "token_f1"])
    with pytest.raises(UserError, match="choice_accuracy is measured on choices, and these rows are answers"):
        evaluate.run([str(run)], data=data, named=["loss", "choice_accuracy"])
    with pytest.raises(UserError, match=r"two sets are called a\.jsonl"):
        evaluate.run([str(run)], data=["a.jsonl", "a.jsonl"])
    with pytest.raises(UserError, match="--show-changes: has no effect: there is one model"):
        evaluate.run([str(run)], data=data, show_changes=3)
    done = ft("eval", run, "--data", numbers, "--data", tmp_path / "gone.jsonl")
    assert (done.returncode, "gone.jsonl: --data: no such file" in done.stderr) == (2, True)


def test_leakage_stands_beside_the_figures(
    recipe: Recipe, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe(eval={"max_new_tokens": 2})).path
    known = [json.loads(line) for line in rows.read_text().splitlines()[:2]]
    data = write_rows(
        tmp_path / "mixed.jsonl", [*known, {"messages": [{"role": "user", "content": "nothing like it"}]}]
    )
    found = measured(tmp_path / "o.json", run, data=str(data))["runs"][0]["metrics"]
    assert (found["trained_on"], found["leakage"]["exact"], found["leakage"]["near"]) == (2, 2, 0)
    example = found["leakage"]["examples"][1]
    assert (example["row"], example["train_file"], example["train_row"]) == (2, str(rows), 2)
    shown = capsys.readouterr().out
    assert "run was trained on 2 of these 3 rows: its figures are not held-out" in shown
    assert f"2 exactly: row 1 is row 1 of {rows.name}; row 2 is row 2 of {rows.name}" in shown


def test_what_a_run_was_trained_on_is_what_its_own_recipe_says(recipe: Recipe, tmp_path: Path) -> None:
    """Eight of 64 rows drawn by the run's seed, whatever data an edited recipe names since."""
    loaded = load(str(recipe(data={"max_samples": 8, "shuffle": True}, train={"seed": 7})), None)
    drawn = {item.row for item in read_samples(loaded.data.train, loaded.data, seed=7)}
    assert drawn != {item.row for item in read_samples(loaded.data.train, loaded.data)}
    held = rows_of(str(loaded.data.train), loaded.data.model_copy(update={"max_samples": None}), None)
    held = replace(held, rows=[row for row in held.rows if row.row in drawn])
    edited = loaded.data.model_copy(update={"train": str(sums(tmp_path / "others.jsonl", range(100, 104)))})
    target = targets.Target("run", loaded.model, None, edited, loaded.eval, recipe=loaded)
    found = leaks_of([target], [Part("x", held, False, 0, [], {})])
    assert found[0]["x"]["trained_on"] == 8


def test_rewards_are_of_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was thought before them, as ft ppo has them scored."""
    read: list[list[dict[str, Any]]] = []

    class Scorer:
        def scores(self, conversations: list[Any]) -> list[float]:
            read.append([one.messages[-1] for one in conversations])
            return [float(len(one.messages[-1]["content"])) for one in conversations]

    monkeypatch.setattr(measuring, "reward_model", lambda *_: Scorer())
    asked = [{"role": "user", "content": "what?"}]
    samples = [Conversation([*asked, {"role": "assistant", "content": "<think>hm</think>so"}]), Conversation(asked)]
    rows: list[dict[str, Any]] = [
        {"prediction": " yes ", "thinking": "let me see", "reference": "so"}, {"prediction": "", "reference": None},
    ]  # fmt: skip
    result = generation.Evaluation("x", 2, {}, rows)
    measuring.add_rewards("r", [result], samples, [m for m in METRICS if m.needs == "reward"])
    assert read == [
        [{"role": "assistant", "content": "<think>hm</think>so"}],
        [{"role": "assistant", "content": "yes", "reasoning_content": "let me see"},
         {"role": "assistant", "content": " "}],
    ]  # fmt: skip
    assert (result.metrics["reward"], result.metrics["win_rate"]) == (2.0, 0.0)


def test_a_users_metric_is_asked_once_of_each_row(run: Path, base: Path, tmp_path: Path) -> None:
    """Comparisons and changes take what was noted; it is tried on the first row before."""
    (tmp_path / "own.py").write_text(
        "calls = 0\ndef f(prediction, reference):\n    global calls\n    calls += 1\n    return calls / 100\n"
    )
    data = sums(tmp_path / "few.jsonl", range(3))
    named = [f"{tmp_path / 'own.py'}:f"]
    found = measured(tmp_path / "o.json", run, data=str(data), named=named, compare_base=True, show_changes=1)
    (one,) = found["comparisons"]
    assert one["difference"] == pytest.approx(0.03)
    (row,) = found["changes"][0]["rows"]
    assert row["b"]["value"] - row["a"]["value"] == pytest.approx(0.03)


def test_a_few_rows_prove_no_loss() -> None:
    """Of the very same difference in each row: five may be chance."""
    loss = [metric for metric in METRICS if metric.name == "loss"]
    for n, proven in ((1, False), (5, False), (6, True)):
        runs = [generation.Evaluation(name, n, {}, [{"loss": value, "loss_tokens": 3}] * n)
                for name, value in (("base", 1.0), ("run", 1.5))]  # fmt: skip
        assert bool(comparisons.forgotten([comparisons.compare(*runs, loss[0])], loss)) is proven


def test_no_change_is_told_in_the_words_of_its_metric(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sums(tmp_path / "few.jsonl", range(3))
    copied = shutil.copytree(base, tmp_path / "copy")
    evaluate.run([str(base), str(copied)], data=str(data), named=["loss"], show_changes=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "worse with copy than with random-llama (loss): 0 of 3 rows" in said


# --- going on ---


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models without a recipe answer with at most 6 tokens."""
    plain = evaluate.with_settings

    def limited(*arguments: Any) -> Any:
        found = plain(*arguments)
        return replace(found, eval=found.eval.model_copy(update={"max_new_tokens": 6}))

    monkeypatch.setattr(evaluate, "with_settings", limited)


def test_an_interrupted_evaluation_goes_on_from_its_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the third batch: four answers are there, and only the other five are written; nothing stays behind."""
    data, file = sums(tmp_path / "rows.jsonl", range(9)), tmp_path / "o.json"
    whole, lines = tmp_path / "whole.jsonl", tmp_path / "again.jsonl"
    options: dict[str, Any] = {"model": str(base), "data": str(data), "temperature": 0.9, "seed": 4}
    options["named"] = ["exact_match"]

    short(monkeypatch)
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(continuous, "can", lambda model: False)  # a call for each batch
    batches: list[int] = []
    real = generation.answer

    def counted(model: Any, ids: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(len(ids))
        return real(model, ids, *more, **named)

    def of_two(prompts: Any, batch_size: int, equal_length: bool) -> Any:
        return plain(prompts, 2, equal_length)

    plain = generation.batches
    monkeypatch.setattr(generation, "batches", of_two)
    monkeypatch.setattr(generation, "answer", counted)
    stop_at = -1
    measured(file, predictions=str(whole), **options)
    assert sum(batches) == 9
    stop_at, batches[:] = 2, []
    with pytest.raises(Interrupted, match="interrupted with 4 answers kept") as caught:
        evaluate.run([], **options)
    assert caught.value.add == ("--resume",)
    assert "are kept" not in capsys.readouterr().err  # said once, with the command
    stop_at, batches[:] = -1, []
    found = measured(file, predictions=str(lines), resume=True, **options)
    assert sum(batches) == 5
    assert lines.read_text() == whole.read_text()
    assert "tokens_per_second" not in found["runs"][0]["metrics"], "some of the answers took no time"
    assert not list((tmp_path / kept.FOLDER).glob("*.jsonl"))
    batches[:] = []
    measured(file, **options)
    assert sum(batches) == 9, "without --resume nothing is taken over"
    with pytest.raises(UserError, match="--resume: has no effect: none of the metrics needs answers"):
        evaluate.run([], **{**options, "temperature": None, "seed": None, "named": ["loss"]}, resume=True)


def test_what_is_cut_off_or_of_another_seed_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path)
    first = kept.Kept()
    answers = first.of({"seed": 1, "temperature": 1.0})
    answers.add([1, 2], 0, "a")
    answers.add([1, 2], 1, "b")
    first.close(done=False)
    (path,) = (tmp_path / kept.FOLDER).glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-4])
    again = kept.Kept(resume=True)
    assert again.of({"seed": 2, "temperature": 1.0}).known == {}
    found = again.of({"seed": 1, "temperature": 1.0})
    assert (found.get([1, 2], 0), found.get([1, 2], 1)) == ("a", None)
    found.add([1, 2], 1, "c")
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["a", "c"]
    again.close(done=True)
    assert not path.exists()


def test_another_evaluation_leaves_the_answers_of_an_interrupted_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short(monkeypatch)
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path)
    first, other = sums(tmp_path / "first.jsonl", range(3)), sums(tmp_path / "other.jsonl", range(7, 9))
    plain = evaluate.report

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "report", stopped)
    with pytest.raises(Interrupted):
        evaluate.run([], model=str(base), data=str(first), named=["exact_match"])
    monkeypatch.setattr(evaluate, "report", plain)
    evaluate.run([], model=str(base), data=str(other), named=["exact_match"])
    capsys.readouterr()
    evaluate.run([], model=str(base), data=str(first), named=["exact_match"], resume=True)
    assert "--resume: 3 answers are there" in capsys.readouterr().err


# --- memory ---


def held_bytes() -> int:
    """Of all tensors that are alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
                if issubclass(type(t), torch.Tensor)}.values())  # fmt: skip


def test_ten_times_the_rows_take_no_more_memory(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors at the most, and ids that are held at once: both are those of a window, however many there are."""
    monkeypatch.setattr(generation, "WINDOW", 8)
    (target,) = targets.find_targets([], None, str(base), None)
    evaluation = target.eval.model_copy(update={"max_new_tokens": 2, "batch_size": 4})
    target = replace(target, eval=evaluation)
    real, generate = generation.answer, generation.generate
    most: dict[str, int] = {}

    def looked(*given: Any, **named: Any) -> Any:
        most["batches"] += 1
        if most["batches"] in (1, count // 2):  # a look is slow: at the first batch and at the last
            most["tensors"] = max(most["tensors"], held_bytes())
        return real(*given, **named)

    def asked(model: Any, encoder: Any, prompts: list[Any], *more: Any) -> Any:
        most["prompts"] = max(most["prompts"], len(prompts))
        return generate(model, encoder, prompts, *more)

    monkeypatch.setattr(generation, "answer", looked)
    monkeypatch.setattr(generation, "generate", asked)
    peaks = []
    for count in (8, 80):
        most.update(tensors=0, prompts=0, batches=0)
        rows = HeldSet("x", str(sums(tmp_path / "rows.jsonl", range(10, 10 + count))))
        gc.collect()
        assert measuring.evaluate_target(target, parts.held_out(target, rows, None)).n == count
        peaks.append(dict(most))
    assert [peak["batches"] for peak in peaks] == [4, 40]  # two tokens each, in continuous batches
    assert peaks[0]["prompts"] == peaks[1]["prompts"] == 8
    assert peaks[1]["tensors"] <= 1.02 * peaks[0]["tensors"]


def test_windows_change_no_figure(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, drawn answers: in windows of three they are those of one window."""
    rows = [{"prompt": "ab" * (n * 7 % 5 + 1), "answer": "x" * n} for n in range(1, 9)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    short(monkeypatch)
    found = []
    for window in (generation.WINDOW, 3):
        monkeypatch.setattr(generation, "WINDOW", window)
        lines = tmp_path / f"{window}.jsonl"
        evaluate.run([], model=str(base), data=str(data), temperature=0.8, predictions=str(lines), show=0)
        found.append([json.loads(line) for line in lines.read_text().splitlines()])
    assert [row["prediction"] for row in found[0]] == [row["prediction"] for row in found[1]]
    assert [row["loss"] for row in found[0]] == pytest.approx([row["loss"] for row in found[1]], abs=1e-5)


def test_what_is_given_twice_or_is_no_name(base: Path, tmp_path: Path) -> None:
    """An unset variable of the shell is not the working directory; runs of one name are told apart by their places."""
    rows = sums(tmp_path / "rows.jsonl", range(2))
    for arguments, said in {
        ("--data", ""): "--data: an argument is empty",
        (base, "--data", rows): "is given twice → name it once",
    }.items():
        done = ft("eval", base, *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in " ".join(done.stderr.split())
    places = [str(tmp_path / name / "best") for name in ("a", "b")]
    for place in places:
        shutil.copytree(base, place)
    found = targets.find_targets([*places, str(base)], None, None, None)
    assert [target.name for target in found] == [*places, base.name]


def test_prompts_beyond_what_the_model_was_made_for_are_told(base: Path, tmp_path: Path) -> None:
    """512 tokens, and its tokens are bytes."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab" * n, "answer": "c"} for n in (1, 200, 250)])
    said = " ".join(ft("eval", base, "--data", rows, "--metrics", "loss", "--show", "0").stderr.split())
    assert f"{base.name}: 1 of 3 prompts have 512 tokens or more, for which the model was not made" in said
