"""`train.report_to`: each tracker read back by its own means, offline; what is missing is named before anything loads.

Skipped where a tracker is not installed (`pip install '.[trackers]'`).
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ft, train

from finetune.errors import UserError
from finetune.recipe.file import check, load
from finetune.recipe.stages import SftRecipe
from finetune.run.directory import Run
from finetune.training import tracking

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # trackers warn of their own affairs
]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"pip install {package}")


def trained(recipe: Callable[..., Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)  # where trackers put their files
    found: Run = train(recipe(train={"report_to": name, "max_steps": 2, "effective_batch_size": 8, "logging_steps": 1}))
    return found


def logged(run: Run) -> list[float]:
    return [row["loss"] for row in run.read_metrics() if "loss" in row]


@needs("tensorboard")
def test_tensorboard(recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trained(recipe, "tensorboard", tmp_path, monkeypatch)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == [1, 2]
    assert [point.value for point in points] == pytest.approx(logged(run))
    result = json.loads(run.result.read_text())
    (peak,) = events.Scalars("result/train_loss")
    assert peak.value == pytest.approx(result["train_loss"])
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "learning_rate: 0.01" in text


@needs("wandb")
def test_wandb_offline(recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trained(recipe, "wandb", tmp_path, monkeypatch)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end, read = time.monotonic() + 60, wandb_records(kept)
    while "exit" not in read and time.monotonic() < end:  # wandb's own process writes the last of it a moment later
        time.sleep(0.1)
        read = wandb_records(kept)
    assert [r["train/loss"] for r in read["history"] if "train/loss" in r] == pytest.approx(logged(run))
    assert read["config"]["recipe"]["train"]["learning_rate"] == 0.01
    assert read["summary"]["result/train_loss"] == pytest.approx(json.loads(run.result.read_text())["train_loss"])
    assert read["name"] == run.path.name
    assert read["exit"] == 0


def leveldb_log(content: bytes, at: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, which wandb writes: blocks of 32 KiB, in them parts with a header of
    checksum, length and type (1 whole, 2 first, 3 middle, 4 last). at: place of `content` in the file."""
    place, whole = 0, b""
    while place < len(content):
        if (room := 32768 - (at + place) % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def wandb_records(path: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"history": [], "config": {}, "summary": {}}
    for data in leveldb_log(path.read_bytes()[7:], 7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        values = lambda items: {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}  # noqa: E731
        if kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "run":
            found["name"] = record.run.display_name
            found["config"] |= values(record.run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "summary":
            found["summary"] |= values(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


@needs("swanlab")
def test_swanlab_offline(recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    trained(recipe, "swanlab", tmp_path, monkeypatch)
    (kept,) = (tmp_path / "swanlog").glob("run-*")
    config = yaml.safe_load((kept / "files" / "config.yaml").read_text(encoding="utf-8"))
    assert config["recipe"]["value"]["train"]["learning_rate"] == 0.01
    (records,) = kept.glob("*.swanlab")
    content = records.read_bytes()
    assert b"train/loss" in content
    assert b"result/train_loss" in content


@needs("trackio")
def test_trackio_local(recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage as storage

    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    run = trained(recipe, "trackio", tmp_path, monkeypatch)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("select metrics from metrics order by id")]
        names = {name for (name,) in connection.execute("select run_name from metrics")}
        ((config,),) = connection.execute("select config from configs")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(logged(run))
    assert rows[-1]["result/steps"] == 2
    assert names == {run.path.name}
    assert json.loads(config)["recipe"]["train"]["learning_rate"] == 0.01


@needs("mlflow")
def test_mlflow_in_files(recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "ml").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = trained(recipe, "mlflow", tmp_path, monkeypatch)
    client = mlflow.MlflowClient((tmp_path / "ml").as_uri())
    (found,) = client.search_runs(["0"])
    assert found.info.run_name == run.path.name
    assert found.info.status == "FINISHED"
    assert found.data.params["recipe.train.learning_rate"] == "0.01"
    assert [m.value for m in client.get_metric_history(found.info.run_id, "loss")] == pytest.approx(logged(run))
    assert found.data.metrics["result/steps"] == 2


@needs("tensorboard")
def test_ppo_reports_every_rollout(tmp_path: Path, base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from finetune.commands import ppo
    from finetune.recipe.stages import PpoRecipe

    rule = "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
    (tmp_path / "rules.py").write_text(rule)
    values = {
        "version": 1, "stage": "ppo", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 64}, "reward": {"functions": [f"{tmp_path}/rules.py:score"]},
        "ppo": {"max_new_tokens": 4, "num_mini_batches": 2}, "output": {"dir": str(tmp_path / "run")},
        "train": {"max_steps": 2, "effective_batch_size": 8, "logging_steps": 1, "report_to": ["tensorboard"]},
    }  # fmt: skip
    checked = check(values, "ppo")
    assert isinstance(checked, PpoRecipe)
    ppo.run(checked)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    kept = [row["reward_mean"] for row in Run(tmp_path / "run").read_metrics()]
    assert [point.value for point in events.Scalars("train/reward_mean")] == pytest.approx(kept)
    assert events.Scalars("result/steps")[0].value == 2


def test_what_is_not_installed_is_named_before_anything_loads(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.early import tracking as early

    monkeypatch.setattr(early, "PACKAGES", dict.fromkeys(early.PACKAGES, ("no_such_package",)))
    done = ft("sft", recipe(), "--set", "train.report_to=wandb,trackio")
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[0] == "train.report_to: wandb is not installed → pip install no_such_package no_such_package"
    assert said[1].startswith("train.report_to: trackio is not installed")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [("wandb", ["wandb"]), ("WandB, tensorboard", ["wandb", "tensorboard"]), (["mlflow", "mlflow"], ["mlflow"]),
     ("none", []), (None, [])],
)  # fmt: skip
def test_how_they_are_named(given: Any, names: list[str], recipe: Callable[..., Path]) -> None:
    assert load(str(recipe(train={"report_to": given})), SftRecipe).train.report_to == names


def test_all_and_unknown_ones_are_refused(recipe: Callable[..., Path]) -> None:
    for given in ("all", ["wandb", "comet_ml"], 3):
        with pytest.raises(UserError, match=r"train\.report_to"):
            load(str(recipe(train={"report_to": given})), SftRecipe)


class Fake:
    """A tracker that is told things, and breaks at its second row."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._wandb = SimpleNamespace(
            config={}, run=SimpleNamespace(summary={}), finish=lambda exit_code: self.rows.append(exit_code)
        )
        self._log_model = SimpleNamespace(is_enabled=False)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wandb.config = SimpleNamespace(update=lambda values, **_: self.rows.append(values))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any) -> None:
        if len(self.rows) > 1:
            raise ConnectionError("the network is away")
        self.rows.append((state.global_step, logs))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(tracking, "get_reporting_integration_callbacks", lambda names: [lambda: made])
    return made


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    fake: Fake, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe(train={"report_to": "wandb", "max_steps": 3, "effective_batch_size": 8, "logging_steps": 1}))
    config, first = fake.rows
    assert config["recipe"]["train"]["report_to"] == ["wandb"]
    assert first[0] == 1
    assert first[1]["loss"] == logged(run)[0]
    assert len(logged(run)) == 3
    assert "wandb is left out from here on (the network is away)" in capsys.readouterr().err


def test_a_run_that_fails_is_told_to_its_tracker(fake: Fake, tmp_path: Path) -> None:
    values = {"version": 1, "stage": "sft", "model": {"name": "m"}, "data": {"train": "d"}}
    checked = check({**values, "train": {"report_to": ["wandb"]}, "output": {"dir": str(tmp_path)}}, "sft")
    trackers = tracking.Trackers(checked, Run(tmp_path), {"output_dir": str(tmp_path)})
    trackers.log({"loss": 1.0, "eval_x": 0.5, "eval_x_ci": [0.4, 0.6], "note": "text", "nan": float("nan")}, 7)
    assert fake.rows[1] == (7, {"loss": 1.0, "eval_x": 0.5, "eval_x_ci_low": 0.4, "eval_x_ci_high": 0.6})
    trackers.finish(None)
    assert fake.rows[-1] == 1
    trackers.finish({"train_loss": 0.5})
    assert len(fake.rows) == 3, "it has ended once"
