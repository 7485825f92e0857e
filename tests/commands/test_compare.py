"""`ft compare`: every job trained and measured in processes of its own, what is done is not done again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ft, write_rows
from rl_kit import here

from finetune import child, places
from finetune.commands import compare
from finetune.commands.compare import jobs, measure, plan
from finetune.errors import Interrupted, RunError, UserError
from finetune.recipe.file import load, to_yaml
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import DuringConfig, SourceConfig
from finetune.recipe.stages import SftRecipe

Recipes = Callable[..., Path]


@pytest.fixture
def checked(recipe: Recipes, rows: Path, monkeypatch: pytest.MonkeyPatch) -> SftRecipe:
    monkeypatch.setattr(plan, "FACTORS", (1.0,))
    section = {"data": str(rows), "limit": 8, "max_new_tokens": 4}
    return load(str(recipe(eval=section, train={"max_steps": 4, "learning_rate": 1e-2})), SftRecipe)


def compared(
    recipe: SftRecipe, methods: list[str], quantizations: Any = ("none",), fractions: Any = (1.0,), output: str = "",
    **more: Any,
) -> None:  # fmt: skip
    compare.run(recipe, methods=methods, quantizations=quantizations, fractions=fractions, output=output, **more)


@pytest.mark.whole
def test_a_comparison_from_start_to_end(
    checked: SftRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is measured in a process of its own; the rest here, or each step would cost nine seconds of imports."""
    folder, started, in_a_process = tmp_path / "a comparison", [], child.run

    def run(*arguments: str, module: str = "finetune") -> tuple[int, str]:
        started.append(module)
        if len(started) == 1:
            return in_a_process(*arguments, module=module)
        if module == "finetune":
            return here(*arguments)
        Path(arguments[1]).write_text(json.dumps(measure.measure(Path(arguments[0]))))
        return 0, ""

    monkeypatch.setattr(child, "run", run)
    lists = plan.parse("lora, prompt_tuning,lora", "none", "1")
    compared(checked, *lists, output=str(folder))
    measuring = "finetune.commands.compare.measure"
    assert started == [measuring, *["finetune", "finetune", measuring] * 2], "a short run, the run, its measures"
    base, *trained = json.loads((folder / "compare.json").read_text())["jobs"]
    assert [base["name"], *(job["method"] for job in trained)] == ["base", "lora", "prompt_tuning"]
    low, high = base["metrics"]["loss_ci"]
    assert low < base["metrics"]["loss"] < high
    for job in trained:
        assert job["trainable_parameters"] > 0
        assert 0 <= job["metrics"]["exact_match"] <= 1
        assert job["metrics"]["exact_match_ci"][0] <= job["metrics"]["exact_match_ci"][1]
        assert job["metrics"]["loss"] < base["metrics"]["loss"]
        assert 0 < job["backward_share"] < 1
        assert job["train_tokens_per_second"] > 0
        assert job["adapter_bytes"] == sum(
            file.stat().st_size for file in (folder / job["name"] / "adapter").glob("*.safetensors")
        )
        assert [step["learning_rate"] for step in job["search"]] == [job["learning_rate"]]
    table = (folder / "compare.md").read_text()
    shown = capsys.readouterr()
    assert table in shown.out
    (told,) = [line for line in shown.err.splitlines() if line.startswith("next ")]
    done = ft(*shlex.split(told)[2:], "--limit", 2, cwd=tmp_path)  # as it is printed, in a folder with a space
    assert done.returncode == 0, done.stderr
    assert "exact match" in done.stdout
    assert "| base | – |" in table
    assert "| prompt_tuning |" in table
    assert (folder / "compare.png").stat().st_size > 1000

    monkeypatch.setattr(jobs, "process", lambda *arguments, **_: pytest.fail(f"done already: {arguments}"))
    compared(checked, *lists, output=str(folder), json_file="-")
    assert json.loads(capsys.readouterr().out)["jobs"][0]["name"] == "base"
    other = checked.model_copy(update={"train": checked.train.model_copy(update={"max_steps": 5})})
    with pytest.raises(UserError, match=r"other values of train\.max_steps"):
        compared(other, *lists, output=str(folder))


def test_the_search_is_announced_and_the_time_told_after_the_first_job(
    checked: SftRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job of 4 steps has one short run of 1 step here, so 5 steps; a job that is there already tells no time."""
    clock = iter(range(0, 1000, 50))  # 50 s from each look at it to the next
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    monkeypatch.setattr(jobs, "measure_base", lambda recipe, kind, folder: {"name": "base", "metrics": {}})
    folder = tmp_path / "comparison"

    def run_job(job: plan.Job, recipe: SftRecipe, rows: int, folder: Path) -> dict[str, Any]:
        (folder / job.name).mkdir(parents=True, exist_ok=True)
        (folder / job.name / "measured.json").touch()
        return {"name": job.name, "metrics": {"loss": 1.0}, "learning_rate": 0.01, "method": job.method,
                "quantization": "none", "rows": 64, "row_losses": []}  # fmt: skip

    monkeypatch.setattr(jobs, "run_job", run_job)
    (folder / "lora").mkdir(parents=True)
    (folder / "lora" / "measured.json").touch()
    (folder / plan.MARK).write_text(to_yaml(checked))
    compared(checked, ["lora", "bitfit", "full", "ia3"], output=str(folder))
    said = capsys.readouterr().err.splitlines()
    assert "4 jobs, 20 steps: for each first its learning rate, from 1 short run" in said[0]
    assert "25% of the steps each, scored on 10% of the training rows" in said[0]
    ends = [line.rpartition("; about ")[2] for line in said[1:5]]
    assert said[1].endswith("(0:50)")
    assert ends[1:3] == ["1:40 left", "0:50 left"]
    assert "left" not in said[4]


def test_base_and_jobs_are_measured_alike(checked: SftRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dtype: auto` is what training makes of it, also for the base; prompts hold the rows' tools."""
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    turns = [{"role": "user", "content": "hot?"}, {"role": "assistant", "content": "yes"}]
    held_out = write_rows(tmp_path / "tools.jsonl", [{"messages": turns, "tools": tools}])
    seen: dict[str, Any] = {}

    def load_model(config: Any, dtype: Any, *_: Any) -> None:
        seen["dtype"] = dtype
        raise RunError("seen enough")

    def prompt_ids(self: Any, messages: Any, given: Any = None) -> list[int]:
        seen["tools"] = given
        return [1]

    monkeypatch.setattr("finetune.models.loading.load_model", load_model)
    monkeypatch.setattr("finetune.data.chat.TemplateEncoder.prompt_ids", prompt_ids)
    monkeypatch.setattr("finetune.models.hardware.detect", lambda: Hardware(bf16=True))
    raw = checked.model_copy(
        update={
            "model": checked.model.model_copy(update={"dtype": "auto"}),
            "eval": checked.eval.model_copy(update={"data": str(held_out)}),
        }
    )
    for recipe in (raw, resolve(raw, Hardware(bf16=True))):  # of the base, and of a job
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        with pytest.raises(RunError, match="seen enough"):
            measure.measure(tmp_path)
        assert str(seen["dtype"]) == "torch.bfloat16"
        assert seen["tools"][0]["function"]["name"] == "weather"


def test_folders_of_others_are_left_alone(checked: SftRecipe, tmp_path: Path) -> None:
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name, what in (("runs", "no comparison"), ("file", "is a file")):
        with pytest.raises(UserError, match=what):
            compared(checked, ["lora"], output=str(tmp_path / name))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lora"]


def test_a_comparison_that_was_killed_at_its_first_file_can_be_started(checked: SftRecipe, tmp_path: Path) -> None:
    left = places.fresh(tmp_path / "all" / plan.MARK)
    left.parent.mkdir()
    left.write_text("stage: sf")
    plan.check_folder(left.parent, checked)
    left.rename(left.parent / "mine.yaml.part")
    with pytest.raises(UserError, match="no comparison"):
        plan.check_folder(left.parent, checked)


def test_what_cannot_be_and_what_fails_are_rows_with_reasons(
    checked: SftRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def process(*arguments: str, module: str = "finetune") -> None:
        started.append(arguments)
        if module == "finetune.commands.compare.measure":
            values = {"metrics": {"loss": 1.0, "loss_ci": [0.9, 1.1]}, "row_losses": [1.0]}
            Path(arguments[1]).write_text(json.dumps(values))
        else:
            raise RunError("the loss became nan")

    monkeypatch.setattr(jobs, "process", process)
    with pytest.raises(RunError, match=r"1 of 1 job failed \(lora-int4\)"):
        compared(checked, ["full", "lora"], ["int4"], output=str(tmp_path / "comparison"))
    table = capsys.readouterr().out
    assert "| full-int4 | refused: quantized weights are integers" in table
    assert "| lora-int4 | failed: " in table
    assert "| base-int4 | – |" in table
    assert not any("full" in argument for arguments in started for argument in arguments)


@pytest.mark.parametrize(
    ("jobs", "changes", "what"),
    [
        (("full", "int4", 1.0), {}, "quantized weights"),
        (("lora", "none", 1.0), {"model": {"adapter": "runs/sft"}}, "every method would train"),
        (("lora", "none", 1.0), {"eval": {"data": None}}, "needs held-out data"),
        (("lora", "none", 1.0), {"eval": {"data": "missing.jsonl"}}, "missing.jsonl"),
        (("lora", "none", 1.0), {"eval": {"shots": 2}}, "eval.shots: has no effect in ft compare"),
        (("lora", "none", 1.0), {"eval": {"metrics": ["token_f1"]}}, "eval.metrics: has no effect"),
        (("lora", "none", 1.0), {"eval": {"during": DuringConfig(steps=50)}}, "eval.during: has no effect"),
        (("lora", "none", 1.0), {"adapter": {"target_modules": ["q_projj"]}}, "q_projj"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    checked: SftRecipe, tmp_path: Path, jobs: tuple[str, str, float], changes: dict[str, Any], what: str
) -> None:
    sections = {key: getattr(checked, key).model_copy(update=values) for key, values in changes.items()}
    method, kind, share = jobs
    with pytest.raises(UserError, match=what):
        compared(checked.model_copy(update=sections), [method], [kind], [share], str(tmp_path / "comparison"))
    assert not (tmp_path / "comparison").exists()


def test_shares_are_drawn_from_every_source(checked: SftRecipe, rows: Path) -> None:
    both = checked.data.model_copy(update={"train": [str(rows), SourceConfig(path=str(rows), max_samples=16)]})
    checked = checked.model_copy(update={"data": both})
    half = plan.Job("lora", "none", 0.5)
    counts = plan.count_rows(checked)
    made = plan.job_recipe(checked, half, counts)
    whole = len(rows.read_text().splitlines())
    assert counts == [whole, 16]
    assert [spec.max_samples for spec in made.data.train] == [whole // 2, 8]
    assert made.data.shuffle
    with pytest.raises(UserError, match="the same number of rows"):
        plan.check_jobs(checked, [plan.Job("lora", "none", share) for share in (0.001, 0.002, 1.0)])


def test_a_signal_reaches_the_job_and_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends in its own time, here by writing a file."""
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "def stop(*_): open('saved', 'w').close(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "open('ready', 'w').close()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted):
        jobs.process(module="job")
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("lists", "what"),
    [
        (("lore", "none", "1"), "unknown method 'lore'"),
        (("lora", "int2", "1"), "unknown kind 'int2'"),
        (("lora", "none", "0.5,2"), "not shares: 0.5,2"),
    ],
)
def test_bad_lists(lists: tuple[str, str, str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        plan.parse(*lists)


def test_rows_of_eval_split_are_measured_on_and_never_trained_on(
    recipe: Recipes, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very rows that `ft sft` holds out; the search for the learning rate does not see them, either."""
    from finetune.data.audit import load_samples
    from finetune.data.held_out import load_eval_rows

    loaded = load(str(recipe(data={"train": str(rows), "eval_split": 9})), SftRecipe)
    seen: list[SftRecipe] = []

    def job(job: plan.Job, built: SftRecipe, *_: Any) -> dict[str, Any]:
        seen.append(built)
        raise RunError("not run")

    monkeypatch.setattr(jobs, "run_job", job)
    monkeypatch.setattr(jobs, "measure_base", lambda *_: {"name": "base", "metrics": {}})
    with pytest.raises(RunError, match="1 of 1 job failed"):
        compared(loaded, ["lora"], output=str(tmp_path / "my comparison"))
    (built,) = seen
    held = plan.split_off(loaded)
    assert len(held.rows) == 9
    assert load_eval_rows(built.eval.data) == held.samples
    used = load_samples(built.data, "sft")
    assert built.data.eval_split is None
    assert sorted(map(repr, [*used, *held.samples])) == sorted(map(repr, load_samples(loaded.data, "sft")))


def test_rows_apart_are_the_same_conversations(tmp_path: Path) -> None:
    """Whatever format they came in."""
    from finetune.data import formats
    from finetune.data.held_out import load_eval_rows
    from finetune.run.writing import write_lines

    for name, form in formats.FORMATS.items():
        if form.kind != "sft":
            continue
        before = load_eval_rows(f"builtin:{form.sample.partition('.')[0]}")
        write_lines(tmp_path / f"{name}.jsonl", [plan.as_row(row, row.group) for row in before])
        assert load_eval_rows(str(tmp_path / f"{name}.jsonl")) == before, name
