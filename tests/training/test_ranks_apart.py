"""What happens to several processes when one of them ends, on several machines, and on Ray."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ft

from finetune.run.directory import Run, resumable

Write = Callable[..., Path]
TWO = ("--launch", "ddp", "--num-processes", "2")


def started(words: Sequence[str], before: Sequence[str] = (), **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more.pop("environment", {})}
    command = [*before, sys.executable, "-m", "finetune", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **more)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def one_of(processes: psutil.Process, rank: str) -> psutil.Process:
    return next(p for p in processes.children() if p.environ().get("RANK") == rank)


def training(recipe: Write, run: Run) -> subprocess.Popen[str]:
    """Two processes that have saved a checkpoint and go on."""
    path = recipe(train={"max_steps": 100_000, "save_steps": 2})
    process = started(["sft", "--recipe", str(path), *TWO])
    end = time.monotonic() + 300
    while run.last_checkpoint() is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    return process


def test_a_killed_process_ends_all(recipe: Write, tmp_path: Path) -> None:
    """It is named, and the run can go on."""
    run = Run(tmp_path / "run")
    process = training(recipe, run)
    one_of(psutil.Process(process.pid), "1").kill()
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1, said
    assert "process 1 of 2 was ended by SIGKILL" in said
    assert "Traceback" not in said
    assert resumable(run)
    assert not run.result.exists()


@pytest.mark.slow
def test_ctrl_c_stops_all_at_the_same_step(recipe: Write, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = training(recipe, run)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 130, said
    assert said.count("stopped at step") == 1
    assert f"--resume {' '.join(TWO)}" in said
    last = run.last_checkpoint()
    assert last is not None
    assert f"stopped at step {last.name.rpartition('-')[2]};" in said


@pytest.mark.slow
def test_a_full_disk_is_no_hang(recipe: Write, tmp_path: Path) -> None:
    """The first process writes alone; what stops it ends the others."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    path = recipe(train={"max_steps": 100_000, "save_steps": 2})
    process = started(["sft", "--recipe", str(path), *TWO], preexec_fn=small)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1, said
    assert "could not be written" in said
    assert not resumable(Run(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_processes_are_one(recipe: Write, tmp_path: Path, kind: str) -> None:
    """With a last step of which some have no row."""
    path = recipe(adapter={"lora_dropout": 0.0}, data={"eval_split": 5}, train={"max_steps": None})
    one, four = tmp_path / "one", tmp_path / "four"
    assert ft("sft", path, "--output", one).returncode == 0
    process = started(["sft", str(path), "--output", str(four), "--launch", kind, "--num-processes", "4"])
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """{name of a network namespace: its address} of two, with a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    names = {f"ft{os.getpid()}{end}": f"10.77.0.{number}" for number, end in enumerate("ab", 1)}
    first, second = names

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in names.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.slow
@pytest.mark.hosts
def test_two_machines_are_one(recipe: Write, tmp_path: Path, hosts: dict[str, str]) -> None:
    path = recipe(adapter={"lora_dropout": 0.0})
    one, two = tmp_path / "one", tmp_path / "two"
    assert ft("sft", path, "--output", one).returncode == 0
    address, processes = next(iter(hosts.values())), []
    for number, name in enumerate(hosts):
        words = [*TWO, "--num-machines", "2", "--machine-rank", str(number), "--main-address", address]
        processes.append(
            started(
                ["sft", str(path), "--output", str(two), *words], ["ip", "netns", "exec", name],
                environment={"GLOO_SOCKET_IFNAME": "cable"},
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra [ray]")
def test_two_workers_of_ray_are_one(recipe: Write, tmp_path: Path) -> None:
    path = recipe(adapter={"lora_dropout": 0.0})
    one, two = tmp_path / "one", tmp_path / "two"
    assert ft("sft", path, "--output", one).returncode == 0
    process = started(["sft", str(path), "--output", str(two), "--launch", "ray", "--num-processes", "2"])
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said[-3000:]
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
