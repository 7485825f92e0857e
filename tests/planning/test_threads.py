"""How many threads compute: what was timed decides, unless the user has; a run that goes on keeps what it had."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train

from finetune.models import hardware
from finetune.planning import threads
from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware, resolve
from finetune.run.checkpoints import known_of
from finetune.run.directory import Run

CPU = Hardware("cpu", bf16=False)


def asked(**model: Any) -> Any:
    values = {"version": 1, "stage": "sft", "model": {"name": "tiny-llama", **model}, "output": {"dir": "r"},
              "data": {"train": "d", "max_length": 32}}  # fmt: skip
    return resolve(check(values, "sft"), CPU)


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    own = torch.get_num_threads()
    for name in threads.SET_BY:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(4)
    monkeypatch.setattr(hardware, "cores_allowed", lambda: 8)
    yield
    torch.set_num_threads(own)


def clock(monkeypatch: pytest.MonkeyPatch, takes: dict[int, float]) -> list[int]:
    """Passes take so long with so many threads; returns with how many they were taken."""
    taken: list[int] = []

    def seconds(network: Any, states: torch.Tensor, half: bool, count: int) -> float:
        taken.append(count)
        return takes[count]

    monkeypatch.setattr(threads, "with_threads", seconds)
    return taken


@pytest.mark.parametrize(
    ("takes", "found"),
    [
        ({1: 4.0, 2: 2.0, 4: 1.0, 8: 0.5}, 8),
        ({1: 1.0, 2: 1.1, 4: 2.0, 8: 9.0}, 1),
        ({1: 4.0, 2: 2.0, 4: 1.0, 8: 0.95}, 4),  # hardly faster: torch's own stays
    ],
)
def test_the_fastest_is_taken_where_it_is_clearly_faster(
    takes: dict[int, float], found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = clock(monkeypatch, takes)
    said = threads.choose(asked(), CPU)
    assert torch.get_num_threads() == found
    assert (said or "").startswith(f"threads: {found} of 8 cores; a block of the model")
    assert taken == [1, 2, 4, 8] * (threads.ROUNDS + 1), "by turns: other work comes and goes"


def test_one_busy_moment_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = iter(range(100))
    slow = {(round_, 4) for round_ in (1, 2, 3)}  # all rounds but one
    monkeypatch.setattr(threads, "with_threads", lambda *given: 9.0 if (next(turn) // 4, given[-1]) in slow else 1.0)
    threads.choose(asked(), CPU)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("machine", "more"),
    [(Hardware("cuda", bf16=True), {}), (Hardware("cpu", bf16=False, processes=2), {}), (CPU, {"OMP_NUM_THREADS": "4"}),
     (CPU, {"OMP_NUM_THREADS": " 4,2"}), (CPU, {"MKL_NUM_THREADS": "4"})],
)  # fmt: skip
def test_nothing_is_timed(machine: Hardware, more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = clock(monkeypatch, {})
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    said = threads.choose(asked(), machine)
    assert not taken
    assert torch.get_num_threads() == 4
    assert said == (f"threads: 4 of 8 cores, as {next(iter(more))} says" if more else None)


def test_a_block_goes_through_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    found = threads.block_seconds(asked(dtype="bfloat16"), [1, 2])
    assert found is not None
    assert found.keys() == {1, 2}
    assert min(found.values()) > 0
    assert torch.get_num_threads() == 4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_what_a_container_allows(files: dict[str, str], found: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware.quota(tmp_path, tmp_path / "own") == found


@pytest.mark.parametrize(
    ("own", "files", "found"),
    [
        ("0::/user.slice/job.scope\n", {"user.slice/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "150000 100000"}, 1.5),
        ("3:cpu,cpuacct:/job\n0::/\n",
         {"cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000"}, 3.0),
        ("0::/../../other\n", {"cpu.max": "max 100000"}, None),
        ("nonsense\n", {"cpu.max": "200000 100000"}, 2.0),
    ],
)  # fmt: skip
def test_what_the_groups_of_the_process_allow(
    own: str, files: dict[str, str], found: float | None, tmp_path: Path
) -> None:
    """A service or a job of a cluster, without a container around it."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    assert hardware.quota(tmp_path / "root", tmp_path / "own") == found


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", ""])
def test_what_torch_passes_over_is_no_choice(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, {1: 1.0, 2: 0.5, 4: 1.0, 8: 1.0})
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert (threads.choose(asked(), CPU) or "").startswith("threads: 2 of 8 cores; a block of the model")


def test_a_run_that_goes_on_keeps_its_number(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed anew, it would now be another one; the weights are those of a run without a stop, to the bit."""
    clock(monkeypatch, {1: 1.0, 2: 0.5, 4: 1.0, 8: 1.0})
    path = recipe(train={"lr_scheduler_type": "constant", "warmup_steps": 0.0})
    whole = train(path, "train.max_steps=4", "train.save_steps=2")
    assert any(line.startswith("threads: 2 of 8") for line in json.loads(whole.result.read_text())["decisions"])
    weights = (whole.adapter / "adapter_model.safetensors").read_bytes()
    torch.set_num_threads(4)
    run = train(path, "train.max_steps=2", "train.save_steps=2", overwrite=True)
    last = Run(run.path).last_checkpoint()
    assert last is not None
    assert known_of(last)["rounding"]["threads"] == "2"
    torch.set_num_threads(4)
    taken = clock(monkeypatch, {1: 0.1, 2: 1.0, 4: 1.0, 8: 1.0})
    run = train(path, "train.max_steps=4", "train.save_steps=2", resume=True)
    assert not taken
    decisions = json.loads(run.result.read_text())["decisions"]
    assert "threads: 2, as the run was begun" in decisions
    assert not any("not equal to the last bit" in line for line in decisions)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == weights


def test_a_machine_with_fewer_cores_times_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0})
    said = threads.choose(asked(), CPU, before=64)
    assert torch.get_num_threads() == 4
    assert "a block of the model" in (said or "")


def test_processes_of_a_launch_share_the_cores_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the machine, of which a container may have few."""
    from finetune.commands import launch
    from finetune.early.launching import Launch

    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert launch.environment(Launch(kind="ddp", processes=2), 0)["OMP_NUM_THREADS"] == "4"
