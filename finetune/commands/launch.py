"""`ft … --launch`: the processes of one machine, by torch.distributed's own starter; each is `ft …` again with a rank.

Nothing is read here. The first process speaks for all; when one ends, the others are ended, and which it was is said,
and where a signal ended it (torch and NCCL abort) the last that it wrote.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

from finetune import ranks
from finetune.child import HANGUP, at_terminal, leave, python_path, stopping
from finetune.early.launching import Launch
from finetune.errors import Interrupted, RunError, UserError
from finetune.models import hardware
from finetune.terminal.progress import note, warn

GRACE = 15  # seconds in which the others may end by themselves
LOOK = 0.1
LINES, MOST_KEPT = 8, 1 << 20
"""Of what a process wrote that a signal has ended: lines that are shown, and bytes that are kept."""
AT_ONCE = 4
"""The signal that ends all of them as they are: they may wait for another machine, and hear none."""


def run(words: Sequence[str], launch: Launch) -> int:
    """Exit code of `ft words…` in `launch.processes` processes, of which this machine has its share."""
    if launch.kind == "ray":
        return on_ray(words, launch)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    here = launch.processes // launch.machines
    check_devices(here)
    arguments = ("-P", "-m", "finetune", *words)
    with tempfile.TemporaryDirectory() as logs:
        said = [Path(logs) / f"{local}.txt" for local in range(here)]
        context: Any = start_processes(
            "ft", sys.executable, dict.fromkeys(range(here), arguments),
            {local: {**environment(launch, local), ranks.SAID: str(file)} for local, file in enumerate(said)},
            DefaultLogsSpecs(log_dir=logs),
        )  # fmt: skip
        return watched([handler.proc for handler in context.subprocess_handlers.values()], context, launch, said)


def check_devices(here: int) -> None:
    """UserError for more processes than GPUs; a warning where there are none, and fewer cores."""
    cards, cores = torch.cuda.device_count(), hardware.cores_allowed()
    if cards and here > cards:
        what = f"{here} processes want a GPU each, and this machine has {cards}"
        raise UserError(what, key="--num-processes", fix=f"start {cards} on each machine")
    if not cards and here > cores:
        warn(f"{here} processes share {cores} cores, and each holds a model: fewer are not slower")


def environment(launch: Launch, local: int) -> dict[str, str]:
    here = launch.processes // launch.machines
    values = {
        "RANK": launch.machine_rank * here + local, "LOCAL_RANK": local, "WORLD_SIZE": launch.processes,
        "LOCAL_WORLD_SIZE": here, "GROUP_RANK": launch.machine_rank, "MASTER_ADDR": launch.main_address,
        "MASTER_PORT": launch.main_port, ranks.KIND: launch.kind, ranks.WORDS: " ".join(launch.words()),
        ranks.LAUNCHER: os.getpid(), "TORCHELASTIC_USE_AGENT_STORE": False, "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or max(1, hardware.cores_allowed() // here),
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def watched(processes: Sequence[Any], context: Any, launch: Launch, said: Sequence[Path] = ()) -> int:
    """The exit code of all of them; signals go to each, which then ends in its own time.

    said: what each has written as errors, where that is kept.
    """
    terminals, asked = at_terminal(), list[int]()

    def pass_on(number: int, frame: Any) -> None:
        if number == HANGUP:
            leave(terminals)
        number = signal.SIGTERM if number == signal.SIGINT else number  # Python shows a traceback before ft has begun
        asked.append(number if len(asked) + 1 < AT_ONCE else signal.SIGKILL)
        for process in processes:
            if process.poll() is None:
                process.send_signal(asked[-1])

    before = [(number, signal.signal(number, pass_on)) for number in stopping()]
    try:
        while all(process.poll() == 0 or process.poll() is None for process in processes):
            if all(process.poll() == 0 for process in processes):
                return 0
            shorten(said)
            time.sleep(LOOK)
        end = time.monotonic() + GRACE
        while any(process.poll() is None for process in processes) and (asked or time.monotonic() < end):
            time.sleep(LOOK)
        still = {number for number, process in enumerate(processes) if process.poll() is None}
        context.close(signal.SIGTERM, timeout=GRACE // 3)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    first = launch.machine_rank * len(processes)
    codes = [0 if number in still else process.poll() for number, process in enumerate(processes)]
    words = {first + number: last_lines(file) for number, file in enumerate(said)}
    return told({first + number: code for number, code in enumerate(codes) if code}, launch, asked, words)


def shorten(said: Sequence[Path]) -> None:
    """Libraries may warn at every step, and the disk is small; they append, so that it goes on from the start."""
    for file in said:
        if file.is_file() and file.stat().st_size > MOST_KEPT:
            os.truncate(file, 0)


def last_lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LINES:]


def told(
    codes: dict[int, int], launch: Launch, asked: Sequence[int] = (), words: Mapping[int, Sequence[str]] | None = None
) -> int:
    """The exit code of those that failed by themselves; a signal that ended one is said, as nobody else can.

    asked: the signals that this process has sent to all of them; words: the last that each wrote.
    """
    killed = {rank: -code for rank, code in codes.items() if code < 0 and -code not in asked}
    for rank, number in killed.items():
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        said = " (out of memory?)" if number == signal.SIGKILL else ""
        note(f"process {rank} of {launch.processes} was ended by {name}{said}, and the others with it", "red")
        for line in (words or {}).get(rank, ()):
            note(f"process {rank}: {line}", "red")
    if killed:
        return 1
    own = {rank: code for rank, code in codes.items() if code > 0 and code != ranks.Lost.exit_code}
    if asked and not own:  # before they had begun, or as they are
        note("interrupted", "yellow")
        return Interrupted.exit_code
    if not asked and set(own.values()) == {Interrupted.exit_code} and len(own) < launch.processes // launch.machines:
        alone = ", ".join(map(str, own))
        note(f"process {alone} of {launch.processes} was interrupted, and the others end with it", "red")
    return next(iter(own.values()), 1)


def on_ray(words: Sequence[str], launch: Launch) -> int:
    """The same on a Ray cluster, by Ray Train's TorchTrainer; this process waits. Folders must be shared."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    given = {"words": list(words), "folder": os.getcwd(), "launch": " ".join(launch.words())}
    scaling = ScalingConfig(num_workers=launch.processes, use_gpu=torch.cuda.is_available())
    try:
        TorchTrainer(of_ray, train_loop_config=given, scaling_config=scaling).fit()
    except Exception as error:  # Ray's own kinds, around the one of the process
        codes = re.findall(r"ft ended with (\d+)", str(error))
        if not codes:
            raise RunError(f"Ray: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
        return next((int(code) for code in codes if int(code) != ranks.Lost.exit_code), 1)
    return 0


def of_ray(given: dict[str, Any]) -> None:
    """One of Ray's processes, which has its rank and its group already."""
    os.chdir(given["folder"])
    os.environ |= {ranks.KIND: "ddp", ranks.WORDS: given["launch"]}
    sys.argv = ["ft", *given["words"]]
    try:
        runpy.run_module("finetune", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"ft ended with {ended.code}") from None
