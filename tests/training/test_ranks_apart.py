"""What happens to several processes when one of them ends, on several machines, and on Ray."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ft, write_rows
from test_ranks import ACCELERATE, TORCHRUN

from finetune.early import launching
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_at_the_same_step(recipe: Write, tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path / "run")
    process = training(recipe, run)
    process.send_signal(number)
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
def test_a_disk_that_is_full_for_one_process_is_no_hang(recipe: Write, tmp_path: Path) -> None:
    """It writes the state of its random numbers where the first one writes a checkpoint."""
    run = Run(tmp_path / "run")
    process = training(recipe, run)
    one_of(psutil.Process(process.pid), "1").rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 1, said
    assert "process 1: " in said
    assert "Traceback" not in said
    assert resumable(run)


def test_all_leave_together(tmp_path: Path) -> None:
    """Who goes takes down connections from which the first, which still writes, may read."""
    code = (
        "import time; from pathlib import Path; from finetune import ranks\n"
        "with ranks.joined(lambda: None):\n"
        "    if ranks.first(): time.sleep(1); Path('written').touch()\n"
        "Path(f'left{ranks.rank()}').write_text(str(Path('written').exists()))"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **place, "RANK": str(rank)}, cwd=tmp_path)
        for rank in range(2)
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    assert [(tmp_path / f"left{rank}").read_text() for rank in range(2)] == ["True", "True"]


@pytest.mark.slow
def test_nobody_goes_on_without_the_launcher(recipe: Write, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    process = training(recipe, run)
    children = psutil.Process(process.pid).children()
    process.kill()
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert resumable(run)
    process.communicate()


def of_pairs(folder: Path) -> Path:
    pairs = [
        {"messages": [{"role": "user", "content": f"say {i}"}], "chosen": f"{i} " * (1 + i % 3), "rejected": f"{i + 1}"}
        for i in range(59)
    ]
    return write_rows(folder / "pairs.jsonl", pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_four_processes_are_one(recipe: Write, tmp_path: Path, stage: str, kind: str) -> None:
    """With a last step of which some have no row."""
    data = {"eval_split": 5, **({"train": str(of_pairs(tmp_path))} if stage == "dpo" else {})}
    path = recipe(stage=stage, adapter={"lora_dropout": 0.0}, data=data, train={"max_steps": None})
    one, four = tmp_path / "one", tmp_path / "four"
    assert ft(stage, path, "--output", one).returncode == 0
    process = started([stage, str(path), "--output", str(four), "--launch", kind, "--num-processes", "4"])
    said = process.communicate(timeout=500)[1]
    assert process.returncode == 0, said
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_go_on_as_four_and_four_as_two(recipe: Write, tmp_path: Path, kind: str) -> None:
    """To the loss of one process that was not stopped: nothing of an adapter is lost, whoever held which part of it."""
    path = recipe(adapter={"lora_dropout": 0.0}, train={"lr_scheduler_type": "constant", "warmup_steps": 0})
    assert ft("sft", path, "--output", tmp_path / "one").returncode == 0
    for order in (("2", "4"), ("4", "2")):
        run = tmp_path / "".join(order)
        for steps, processes, more in ((2, order[0], []), (4, order[1], ["--resume"])):
            words = ["--output", str(run), "--set", f"train.max_steps={steps}", *more]
            process = started(["sft", str(path), *words, "--launch", kind, "--num-processes", processes])
            said = process.communicate(timeout=500)[1]
            assert process.returncode == 0, said
        assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=lambda words: words[0])
def test_other_launchers_start_the_module(recipe: Write, tmp_path: Path, launcher: Sequence[Any]) -> None:
    """With paths that are relative to the folder where it is started."""
    path = recipe(adapter={"lora_dropout": 0.0}, output={"dir": "two"})
    assert ft("sft", path, "--output", tmp_path / "one").returncode == 0
    words = [sys.executable, "-m", *map(str, launcher), "2", "-m", "finetune", "sft", path.name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.slow
def test_machines_with_other_rows_are_refused(recipe: Write, tmp_path: Path) -> None:
    """Two machines, here two folders, with files of one name."""
    path, port, processes = recipe(data={"train": "rows.jsonl"}), str(launching.free_port()), []
    for number in range(2):
        folder = tmp_path / f"machine{number}"
        folder.mkdir()
        rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
        (folder / "rows.jsonl").write_text("".join(rows[number:]))
        place = ["--num-machines", "2", "--machine-rank", str(number), "--main-address", "127.0.0.1"]
        words = ["sft", str(path), *TWO, *place, "--main-port", port]
        processes.append(started(words, cwd=folder))
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert {process.returncode for process in processes} <= {1, 2}
    assert any("data.train: what the run reads is not the same for process" in text for text in said), said
    assert not (tmp_path / "run").exists()


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
