"""A process of its own gets the signals that come here, and the time it wants to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from finetune import child

JOB = """
import os, signal, sys, time

def stop(number, _):
    time.sleep(1.0)  # longer than subprocess.run would wait
    open(f"saved-{number}", "a").write("x")
    sys.exit(130)

signal.signal(int(sys.argv[1]), stop)
open("ready", "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=send).start()
    assert child.run(str(int(number)), module="job") == (130, "")
    assert (tmp_path / f"saved-{int(number)}").read_text() == "x"
    assert signal.getsignal(number) == before


def test_a_signal_counts_also_where_the_process_dies_of_it_or_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for handler in ("signal.SIG_DFL", "signal.SIG_IGN"):
        (tmp_path / "job.py").write_text(
            f"import os, signal\nsignal.signal(signal.SIGTERM, {handler})\nos.kill(os.getppid(), signal.SIGTERM)\n"
            "import time; time.sleep(0.5)\n"
        )
        assert child.run(module="job")[0] == 130


def test_what_a_process_says_and_how_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.py").write_text(
        "import os, sys\nprint('out')\nprint(sys.argv[1:], file=sys.stderr)\nsys.stdout.flush()\n"
        "os.kill(os.getpid(), 9) if sys.argv[1:] == ['dies'] else sys.exit(7)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert child.run("a b", module="job") == (7, "['a b']")
    assert capfd.readouterr() == ("", "")
    assert child.run("a b", module="job", shown=True) == (7, "")
    assert capfd.readouterr() == ("out\n", "['a b']\n")
    assert child.run("dies", module="job")[0] == -9


def test_a_command_is_told_that_it_is_a_part() -> None:
    """What is wrong with it is said all the same."""
    code, said = child.run("sft", "--recipe", "nothing.yaml")
    assert (code, said.startswith("nothing.yaml: no such recipe")) == (2, True)


def test_nohup_is_not_undone() -> None:
    assert signal.SIGHUP in child.stopping()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in child.stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_of_the_same_name_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m finetune` looks into the working directory first."""
    (tmp_path / "finetune.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert child.run("--version") == (0, "")
