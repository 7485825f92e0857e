"""A process of its own gets the signals that come here, and the time it wants to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
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


ORPHAN = """
import os, sys
from finetune import child
if len(sys.argv) > 1:
    import time
    from finetune import ranks
    ranks.end_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(60)
child.run("child", module="job", shown=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl(PR_SET_PDEATHSIG) is of Linux alone")
def test_a_part_ends_with_a_whole_that_is_killed(tmp_path: Path) -> None:
    """It would go on writing into a run that somebody may start again."""
    (tmp_path / "job.py").write_text(ORPHAN)
    whole = subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with whole:
        assert whole.stdout is not None
        part = psutil.Process(int(whole.stdout.readline()))
        whole.kill()
        part.wait(30)


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
