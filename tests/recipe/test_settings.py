"""Settings that meet the run: schedules and steps, devices and launchers, new recipes, settings of `ft data check`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SHARED, train, write_rows

import finetune
from finetune.commands import data as data_stage
from finetune.commands import dpo, kto, ppo, pretrain, recipes, reward, sft
from finetune.data.rows import eval_mask
from finetune.errors import UserError
from finetune.models import sources
from finetune.recipe import file as recipe_file
from finetune.recipe.sections import DataConfig, ModelConfig, TrainConfig
from finetune.recipe.stages import RECIPES, PretrainRecipe
from finetune.run.directory import Run
from finetune.training import plan
from finetune.training.optim import check_schedule, warmup_steps

CASES = SHARED / "cases" / "train-flow"
OFF = "train.early_stopping_patience=null"
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "ppo": ppo}


@pytest.mark.parametrize(
    ("wanted", "total", "steps"),
    [
        (0.03, 1, 0),
        (0.03, 33, 0),
        (0.03, 34, 1),
        (0.03, 100, 3),
        (0.29, 100, 29),
        (0.5, 1, 0),
        (0.0, 9, 0),
        (2.0, 9, 2),
    ],
)
def test_warm_up_is_rounded_down(wanted: float, total: int, steps: int) -> None:
    assert warmup_steps(TrainConfig(warmup_steps=wanted), total) == steps


def test_warmup_of_the_measured_recipes() -> None:
    """The figures of README and docs were measured with 20 steps."""
    for name, steps in (("quickstart", 282), ("bitfit_llama", 375), ("align_sft", 313)):
        assert warmup_steps(recipe_file.load(name, RECIPES["sft"]).train, steps) == 20


def test_a_run_of_one_update_learns(recipe: Callable[..., Path]) -> None:
    run = train(recipe(train={"max_steps": 1, "warmup_steps": 0.03}))
    assert run.read_metrics()[0]["learning_rate"] == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"warmup_steps": 100.0}, 6, "train.warmup_steps: 100 steps of warm-up, and the run has 6"),
        ({"warmup_steps": 1.0}, 1, "the learning rate would never be reached"),
        ({"warmup_steps": 5.0}, 6, None),
        ({"warmup_steps": 100.0, "lr_scheduler_type": "constant"}, 6, None),
        (
            {"warmup_steps": 0.7, "lr_scheduler_type": "warmup_stable_decay"},
            10,
            "lr_decay_ratio: 4 steps of decay",
        ),
        (
            {"learning_rate": 1e-8, "lr_scheduler_type": "polynomial"},
            10,
            "learning_rate: polynomial ends",
        ),
    ],
)
def test_a_schedule_fits_into_its_run(settings: dict[str, Any], total: int, expected: str | None) -> None:
    if expected is None:
        check_schedule(TrainConfig(**settings), total)
        return
    with pytest.raises(UserError, match=expected):
        check_schedule(TrainConfig(**settings), total)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_what_does_not_fit_is_said_before_weights_are_loaded(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    def must_not_load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("finetune.models.loading.load_model", must_not_load)
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"number {i} is blue and late"} for i in range(60)])
    data = {} if stage == "sft" else {"train": str(text)}
    for more, expected in (
        ({"train": {"warmup_steps": 100}}, "train.warmup_steps"),
        ({"train": {"eval_steps": 100}, "data": {"eval_split": 9}}, "train.eval_steps: 100 steps between evaluations"),
    ):
        path = recipe(stage=stage, **{**more, "data": {**data, **more.get("data", {})}})
        with pytest.raises(UserError, match=expected):
            STAGES[stage].run(recipe_file.load(str(path), RECIPES[stage]))
    assert not (tmp_path / "run").exists()


def test_polynomial_works_with_muon(recipe: Callable[..., Path]) -> None:
    run = train(recipe(train={"max_steps": 2, "optim": "muon", "lr_scheduler_type": "polynomial"}))
    assert len(run.read_metrics()) == 2


def test_fewer_rows_than_a_step_holds(recipe: Callable[..., Path], tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": f"say {i}", "completion": str(i)} for i in range(3)])
    run = train(recipe(data={"train": str(few)}, train={"max_steps": 1}))
    said = json.loads(run.result.read_text())["decisions"]
    assert "3 training rows are fewer than train.effective_batch_size 8: a step holds 3" in said


@pytest.mark.parametrize(("share", "rows", "expected"), [(0.05, 8, 1), (0.5, 2000, None), (3, 8, 3), (0.05, 1, 1)])
def test_a_share_holds_out_one_row_at_least(share: float, rows: int, expected: int | None) -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, rows, np.uint64)
    hashes |= np.uint64(0 if expected is None else 2**63)  # none that a share of 5% takes
    found = eval_mask(hashes, share)
    assert found.sum() == expected or (expected is None and 900 < found.sum() < 1100)


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("noeval", [], "train.early_stopping_patience: no rows are held out"),
        (
            "noeval",
            ["train.early_stopping_patience=null", "train.load_best_model_at_end=true"],
            "load_best_model_at_end",
        ),
        ("noeval", ["train.early_stopping_patience=null", "train.eval_steps=2"], "train.eval_steps: no rows"),
        ("warm", [], "train.warmup_steps: 100 steps of warm-up, and the run has 6"),
        ("split", [], None),
    ],
)
def test_shared_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, more: list[str],
    expected: str | None,
) -> None:  # fmt: skip
    shutil.copytree(CASES, tmp_path / "cases")
    monkeypatch.chdir(tmp_path / "cases")
    if expected is None:
        sft.run(recipe_file.load(f"{name}.yaml", RECIPES["sft"], more), dry_run=True)
        return
    with pytest.raises(UserError, match=expected):
        sft.run(recipe_file.load(f"{name}.yaml", RECIPES["sft"], more), dry_run=True)


# --- devices ---


def test_other_gpus_stay_out_of_the_batch(monkeypatch: pytest.MonkeyPatch, recipe: Callable[..., Path]) -> None:
    from transformers import TrainingArguments

    config = TrainingArguments(output_dir="x", per_device_train_batch_size=4, use_cpu=True)
    config._n_gpu = 4
    assert config.train_batch_size == 16  # what DataParallel makes of it
    assert plan.one_device(config).train_batch_size == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    section = SimpleNamespace(model=ModelConfig(name="x"))
    said = str(plan.other_devices(section))  # type: ignore[arg-type]
    assert "4 GPUs are here and one is used" in said
    assert "--launch ddp --num-processes 4 uses all" in said
    spread = SimpleNamespace(model=ModelConfig(name="x", device_map="auto"))
    assert plan.other_devices(spread) is None  # type: ignore[arg-type]


def test_every_trainer_is_on_one_device() -> None:
    """A stage that makes trl's or transformers' arguments says so."""
    package = Path(finetune.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        made = sum(text.count(f"= {name}(") for name in ("SFTConfig", "DPOConfig", "KTOConfig", "RewardConfig",
                                                         "TrainingArguments"))  # fmt: skip
        assert text.count("one_device(") >= made, path


# --- where things lie ---


def test_a_model_of_this_name_lies_here(base: Path) -> None:
    for model, expected in (
        ({"source": "hub"}, "model.source: a local folder has this name"),
        ({"revision": "v1"}, "model.revision: is a local folder"),
    ):
        with pytest.raises(UserError, match=expected):
            sources.check(ModelConfig(name=str(base), **model))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.revision"):
        sources.check(ModelConfig(name="tiny-llama", revision="v1"))
    sources.check(ModelConfig(name="owner/name", source="hub", revision="v1"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"source": "hub"}, "source: lies here, too"), ({"split": "test"}, "one file has no split 'test'"),
        ({"name": "x"}, "name: has no effect"), ({"revision": "x"}, "revision: has no effect"),
        ({"source": "local", "split": "x"}, "one file has no split 'x'"),
    ],
)  # fmt: skip
def test_keys_of_a_hub_on_a_file(tmp_path: Path, more: dict[str, str], expected: str) -> None:
    from finetune.data.sources import read_rows

    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=expected):
        list(read_rows({"path": str(path), **more}))


def test_a_local_source_is_never_looked_for_on_a_hub() -> None:
    from finetune.data.sources import read_rows

    with pytest.raises(UserError, match="no such file"):
        list(read_rows({"path": "owner/data", "source": "local"}))


# --- ft recipes new, ft data check --set ---


@pytest.mark.parametrize("stage", RECIPES)
def test_a_new_recipe_runs(
    stage: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    turn = {"prompt": "say it", "completion": "yes"}
    row = {"pretrain": {"text": "yes " * 400}, "sft": turn}.get(stage, {"prompt": "p", "chosen": "a", "rejected": "b"})
    file = tmp_path / "my data: #1.jsonl"
    write_rows(file, [{**row, "prompt": f"say {i}"} if stage != "pretrain" else row for i in range(40)])
    recipes.new("mine.yaml", stage=stage, model=str(base), data=str(file))
    STAGES[stage].run(recipe_file.load("mine.yaml", RECIPES[stage]), dry_run=True)
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n")[2])
    assert printed["stage"] == stage
    assert printed["output"]["dir"] == str(tmp_path / "runs" / "mine")
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert (stage if stage in ("dpo", "kto", "reward", "ppo") else "data") in written or stage == "reward"


def test_settings_of_data_without_a_recipe(tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "r.jsonl", [{"ask": "a", "say": "b"}]))
    for prefix in ("data.", ""):
        items = [f"{prefix}columns.prompt=ask", f"{prefix}columns.completion=say", f"{prefix}max_length=9"]
        found = data_stage.looked_at(None, items, file).config
        assert found.columns == {"prompt": "ask", "completion": "say"}
        assert found.max_length == 9
    for item, expected in (
        ("max_lenght=9", "--set: data.max_lenght: unknown key → did you mean max_length"),
        ("data.max_length=x", "data.max_length: 'x' is not possible here"),
        ("model.name=x", "data.model: unknown key"),
        ("data.shuffle=true", "set data.max_samples"),
    ):
        with pytest.raises(UserError, match=expected):
            data_stage.looked_at(None, [item], file)


# --- pretrain reads as the others do ---


def pretrained(tmp_path: Path, base: Path, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "version": 1, "stage": "pretrain", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(tmp_path / "text.jsonl"), "max_length": 32},
        "train": {"max_steps": 2, "effective_batch_size": 2, "logging_steps": 1},
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe_file.load(str(tmp_path / "r.yaml"), PretrainRecipe)


def test_pretrain_honours_its_sources(tmp_path: Path) -> None:
    from finetune.data import text as raw

    rows = [{"body": f"text {i}", "kind": "ab"[i % 2]} for i in range(10)]
    path = str(write_rows(tmp_path / "rows.jsonl", rows))
    source = {"path": path, "columns": {"text": "body"}, "filter": {"kind": "b"}, "max_samples": 3}
    taken = DataConfig.model_validate({"train": source})
    assert list(raw.documents(taken, 0, 1)) == ["text 1", "text 3", "text 5"]
    drawn = DataConfig.model_validate({"train": {**source, "filter": {}}, "shuffle": True})
    assert len(list(raw.documents(drawn, 0, 1))) == 3
    assert list(raw.documents(drawn, 0, 1)) != [f"text {i}" for i in range(3)]


def test_pretrain_checks_its_rows(tmp_path: Path, base: Path) -> None:
    good = [{"text": f"number {i} is blue and late"} for i in range(40)]
    write_rows(tmp_path / "text.jsonl", [*good, {"text": 5}, {"text": " "}])
    with pytest.raises(UserError) as caught:
        pretrain.run(pretrained(tmp_path, base), dry_run=True)
    assert [line.partition(":")[0].rpartition(", ")[2] for line in caught.value.lines()] == ["row 41", "row 42"]
    pretrain.run(pretrained(tmp_path, base, data={"on_error": "drop"}), dry_run=True)
    with pytest.raises(UserError, match=r"data\.streaming: only hub datasets"):
        pretrain.run(pretrained(tmp_path, base, data={"on_error": "drop", "streaming": True}), dry_run=True)
    both = ["builtin:world", str(tmp_path / "text.jsonl")]
    with pytest.raises(UserError, match="no other source would be read"):
        pretrain.run(pretrained(tmp_path, base, data={"train": both}), dry_run=True)


def test_pretrain_goes_on_from_an_adapter(tmp_path: Path, base: Path) -> None:
    import torch
    from conftest import tensors

    write_rows(tmp_path / "text.jsonl", [{"text": f"number {i} is blue and late"} for i in range(40)])
    lora = {"method": "lora", "r": 4, "target_modules": ["q_proj"]}
    pretrain.run(pretrained(tmp_path, base, adapter=lora))
    first = Run(tmp_path / "run")
    more = {"model": {"adapter": str(first.path)}, "output": {"dir": str(tmp_path / "more")}}
    pretrain.run(pretrained(tmp_path, base, **more, train={"learning_rate": 1e-9}))
    a, b = tensors(first.adapter), tensors(Run(tmp_path / "more").adapter)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)
    assert any(value.abs().max() > 0 for key, value in a.items() if "lora_B" in key)
