"""What happens to a run from outside: signals in every phase, disks that are full or read-only, a second run, data that
changes, clocks that jump."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ft, tensors, write_rows
from safetensors import SafetensorError
from transformers import Trainer

from finetune.child import HANGUP
from finetune.run.checkpoints import complete, damage, discard, known_of, seal
from finetune.run.directory import Run

SETTINGS = {"max_steps": 4, "save_steps": 1, "eval_steps": 2, "save_total_limit": 9}
# phase -> what is called in it, on the recipe's way
PHASES = {
    "checking": "finetune.data.audit.screen",
    "opening the base": "finetune.models.tokenizers.load_tokenizer",
    "reading rows": "finetune.data.conversations.tokenised",
    "loading": "finetune.commands.sft.policy",
    "a step": "transformers.Trainer.training_step",
    "evaluating": "finetune.training.trainers.Extras.evaluation_loop",
    "saving a checkpoint": "finetune.training.checkpointing.complete",
    "saving the weights": "finetune.training.finish.save_adapter",
    "the report": "finetune.report.page.write",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A signal in every phase, and all three before and after the first checkpoint could be; the other pairs are slow.
OFTEN = ("loading", "a step")
CASES = [
    pytest.param(
        phase, number, id=f"{phase}-{number.name}", marks=() if phase in OFTEN or m == n % 3 else pytest.mark.slow
    )
    for n, phase in enumerate(PHASES)
    for m, number in enumerate(SIGNALS)
]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of the run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    done = ft("sft", of_rows(folder, base))
    assert done.returncode == 0, done.stderr
    return folder / "run" / "adapter"


def of_rows(folder: Path, base: Path, run: Path | None = None, **train: Any) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i * 7 % 10}"}]}
        for i in range(32)
    ]
    values = {
        "version": 1, "stage": "sft", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "max_length": 64, "eval_split": 4},
        "adapter": {"method": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {"effective_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, **SETTINGS, **train},
        "output": {"dir": str(run or folder / "run")},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(("phase", "number"), CASES)
def test_a_signal_in_any_phase(
    phase: str, number: signal.Signals, base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 130, nothing that looks finished, and the command that it names goes on to the same weights."""
    if number == HANGUP:
        monkeypatch.setattr("finetune.child.at_terminal", list)
    path, sent = of_rows(tmp_path, base), []
    with monkeypatch.context() as patch:
        place, _, name = PHASES[phase].rpartition(".")
        module, _, kind = place.rpartition(".")
        owner: Any = getattr(import_module(module), kind) if kind[0].isupper() else import_module(place)
        real = getattr(owner, name)

        def disturbed(*args: Any, **kwargs: Any) -> Any:
            if not sent:
                sent.append(number)
                os.kill(os.getpid(), number)
            return real(*args, **kwargs)

        patch.setattr(owner, name, disturbed)
        done = ft("sft", path, cwd=tmp_path)
    assert sent
    assert done.returncode == 130, done.stderr
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run = Run(tmp_path / "run")
    assert not run.result.exists()
    assert all(damage(checkpoint) is None for checkpoint in run.complete_checkpoints())
    last = done.stderr.strip().splitlines()[-1]
    assert "go on with ft sft" in last or "start again with ft sft" in last
    assert ("--resume" in last) == (run.last_checkpoint() is not None)
    words = last.rpartition(" with ft ")[2].split()
    again = ft(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert run.done()
    assert same(run.adapter, whole)


# --- disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_keeps_what_was_saved(base: Path, tmp_path: Path, small_disk: Path) -> None:
    """Checkpoints until there is no room; with room it goes on to the same weights."""
    settings = {"max_steps": 12, "eval_steps": 12}
    done = ft("sft", of_rows(tmp_path, base, small_disk / "run", **settings))
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "goes on with --resume" in done.stderr
    run = Run(small_disk / "run")
    kept = run.complete_checkpoints()
    assert 0 < len(kept) < 12
    assert all(damage(checkpoint) is None for checkpoint in kept)
    assert not run.result.exists()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    again = ft("sft", tmp_path / "recipe.yaml", "--resume")
    assert again.returncode == 0, again.stderr
    assert ft("sft", tmp_path / "recipe.yaml", "--output", tmp_path / "whole").returncode == 0
    assert same(run.adapter, tmp_path / "whole" / "adapter")


def test_a_read_only_disk_is_refused_first(base: Path, tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = ft("sft", of_rows(tmp_path, base, small_disk / "run"))
    assert done.returncode == 2
    assert f"{small_disk}: output.dir: cannot be written to" in done.stderr
    merged = ft("merge", tmp_path, "--output", small_disk / "merged")
    assert merged.returncode == 2


REFUSED = {
    "weights": (SafetensorError, 'Error while serializing: I/O error: {} (os error {}) at path "{}"'),
    "optimizer": (RuntimeError, "[enforce fail at inline_container.cc:747] . open file failed with strerror: {}"),
}
"""The words of safetensors and torch for what the system refuses, from a read-only tmpfs."""


def taking_nothing(folder: Path, first: str, number: int, patch: pytest.MonkeyPatch) -> list[str]:
    """From the first operation of the kind `first` in checkpoint-2 on, nothing below `folder` can be written any more.

    Returns what was refused.
    """
    refused: list[str] = []

    def watched(owner: Any, name: str, kind: str, place: int = 0, writes: Any = lambda *_, **__: True) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            path = args[place] if len(args) > place else more.get("f") or more.get("path")
            inside = isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder) and writes(*args, **more)
            if not inside or not (refused or (kind == first and "checkpoint-2" in os.fspath(path))):
                return real(*args, **more)
            refused.append(kind)
            if kind in REFUSED:
                error, words = REFUSED[kind]
                raise error(words.format(os.strerror(number), number, path))
            raise OSError(number, os.strerror(number), os.fspath(path))

        patch.setattr(owner, name, call)

    def for_writing(_: Any, mode: Any = "r", *__: Any, **___: Any) -> bool:
        return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else any(c in mode for c in "wax+")

    watched(safetensors.torch, "serialize_file", "weights", place=1)
    watched(torch, "save", "optimizer", place=1)
    for owner in (builtins, io, os):
        watched(owner, "open", "file", writes=for_writing)
    for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
        watched(os, name, "name" if name == "replace" else "other")
    return refused


@pytest.mark.parametrize(
    ("first", "number"),
    [*((first, errno.EROFS) for first in ("weights", "optimizer", "file", "name")), ("file", errno.ENOSPC)],
)
def test_a_disk_that_takes_nothing_any_more(
    first: str, number: int, base: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a run, as one that the system makes read-only after an error.

    It is so for root, too, and nothing is mounted: the errors are put where Python, safetensors and torch write.
    """
    path, run = of_rows(tmp_path, base), Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        refused = taking_nothing(run.path, first, number, patch)
        done = ft("sft", path)
    assert refused[0] == first
    assert done.returncode == (2 if number == errno.EROFS else 1), done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert os.strerror(number) in last
    assert "goes on with --resume" in last
    assert ("make room" in last) == (number == errno.ENOSPC)
    assert [checkpoint.name for checkpoint in run.complete_checkpoints()] == ["checkpoint-1"]
    assert damage(run.complete_checkpoints()[0]) is None
    assert not run.result.exists()
    again = ft("sft", path, "--resume")
    assert again.returncode == 0, again.stderr
    assert same(run.adapter, whole)


# --- another process, other data ---


def test_a_second_run_in_the_same_folder(
    base: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is at its third step; it does not notice."""
    path, said = of_rows(tmp_path, base), []
    step = Trainer.training_step

    def beside(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and not said:
            said.append("")
            said[:] = [ft("sft", path, *flags).stderr for flags in ([], ["--resume"], ["--overwrite"])]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", beside)
    assert ft("sft", path).returncode == 0
    assert "already holds files" in said[0]
    assert all("another process is writing here" in text for text in said[1:])
    assert same(tmp_path / "run" / "adapter", whole)


def test_data_that_is_written_to_while_it_is_read(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.data import conversations

    path, load = of_rows(tmp_path, base), conversations.load_sft

    def written_to(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write('{"prompt": "one", "completion": "more"}\n')
        return found

    monkeypatch.setattr(conversations, "load_sft", written_to)
    done = ft("sft", path)
    assert done.returncode == 2
    assert "rows.jsonl: data: has changed while it was read" in done.stderr
    assert not (tmp_path / "run").exists()


def test_data_that_changes_while_it_trains_is_told_on_resume(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, step = of_rows(tmp_path, base), Trainer.training_step
    row = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)[0].replace("say 0", "say 99")

    def written_to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and row not in (tmp_path / "rows.jsonl").read_text():
            with (tmp_path / "rows.jsonl").open("a") as file:
                file.write(row)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", written_to)
        assert ft("sft", path).returncode == 130
    done = ft("sft", path, "--resume")
    assert done.returncode == 2
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert (
        f"has another content than when the run to resume was started ({size - len(row):,} bytes then, {size:,} now)"
        in (done.stderr)
    )


# --- clocks ---


def test_clocks_that_jump(base: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year back and forth with every look; files that are older than what was written before them."""
    path, now, looks = of_rows(tmp_path, base), time.time(), [0]

    def jumping() -> float:
        looks[0] += 1
        return now + (-1) ** looks[0] * 365 * 86400

    step = Trainer.training_step

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        patch.setattr(Trainer, "training_step", stopping)
        assert ft("sft", path).returncode == 130
        run = Run(tmp_path / "run")
        for age, checkpoint in enumerate(run.complete_checkpoints()):
            for file in (*checkpoint.iterdir(), checkpoint):
                os.utime(file, (now + age * 1e6, now + age * 1e6))  # the newest is the oldest
        assert ft("sft", path, "--resume", "--set", "train.save_total_limit=2").returncode == 0
    assert looks[0]
    assert same(run.adapter, whole)
    assert 0 < json.loads(run.result.read_text())["seconds"] < 600
    assert [path.name for path in run.complete_checkpoints()] == ["checkpoint-4", "checkpoint-3"]


# --- another machine, nothing unsafe ---


def test_another_number_of_threads_is_told(base: Path, tmp_path: Path) -> None:
    path = of_rows(tmp_path, base)
    assert ft("sft", path).returncode == 0
    run = Run(tmp_path / "run")
    run.result.unlink()
    last = run.complete_checkpoints()[0]
    known = known_of(last)
    assert known["rounding"]["threads"] == str(torch.get_num_threads())
    assert ft("sft", path, "--resume").stderr.count("not equal to the last bit") == 0
    run.result.unlink()
    known["rounding"] |= {"threads": "99", "device": "another"}
    seal(last, known)
    done = ft("sft", path, "--resume")
    assert done.returncode == 0
    assert "not equal to the last bit to the run without a stop: device CPU with" in done.stderr
    assert f"threads {torch.get_num_threads()} where it was 99" in done.stderr
    assert any("not equal to the last bit" in line for line in json.loads(run.result.read_text())["decisions"])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_runs_no_code(base: Path, tmp_path: Path, name: str) -> None:
    """Also not one whose checksums are right."""
    path = of_rows(tmp_path, base)
    assert ft("sft", path).returncode == 0
    run = Run(tmp_path / "run")
    run.result.unlink()
    discard(run.complete_checkpoints()[0])  # with steps left, all of the one before is read
    last = run.complete_checkpoints()[0]
    known = known_of(last)
    torch.save({"state": Evil(tmp_path / "evil")}, last / name)
    with (last / name).open("rb") as file:
        assert b"mkdir" in file.read()
    known.pop("files")
    complete(last, **known)
    assert damage(last) is None
    done = ft("sft", path, "--resume")
    assert not (tmp_path / "evil").exists()
    assert done.returncode == (0 if name == "training_args.bin" else 1), done.stderr  # which nobody reads
    if done.returncode:
        assert "holds other things than tensors and numbers, which are never loaded" in done.stderr


def test_more_steps_for_a_finished_run(base: Path, tmp_path: Path) -> None:
    """It goes on from its last checkpoint, to the number of steps that is asked for now."""
    path = of_rows(tmp_path, base)
    assert ft("sft", path).returncode == 0
    refused = ft("sft", path, "--resume")
    assert refused.returncode == 2
    assert "this run is finished, there is nothing to resume" in refused.stderr
    before = tensors(tmp_path / "run" / "adapter")
    fewer = ft("sft", path, "--resume", "--set", "train.max_steps=3")
    assert fewer.returncode == 2
    done = ft("sft", path, "--resume", "--set", "train.max_steps=6", "--set", "train.logging_steps=2")
    assert done.returncode == 0, done.stderr
    assert "the learning rate follows the longer schedule from checkpoint-4 on" in done.stderr
    run = Run(tmp_path / "run")
    assert json.loads(run.result.read_text())["steps"] == 6
    assert [row["step"] for row in run.read_metrics() if "loss" in row] == [1, 2, 3, 4, 6]
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(run.adapter).items())
    assert not (run.path / ".replaced").exists()
    other = ft("sft", path, "--resume", "--set", "train.max_steps=8", "--set", "train.learning_rate=0.5")
    assert "train.learning_rate: differs from the run to resume: 0.01 then, 0.5 now" in other.stderr
