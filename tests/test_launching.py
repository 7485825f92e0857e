"""What `--launch` refuses, before anything loads, and what each process is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import ft

from finetune import ranks
from finetune.early import launching
from finetune.errors import RunError, UserError
from finetune.recipe.file import check
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.stages import Recipe


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ranks.OURS, *ranks.ACCELERATE, *launching.OTHERS):
        monkeypatch.delenv(name, raising=False)


def recipe(stage: str = "sft", **sections: Mapping[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": "m"}, "data": {"train": "d"}, "output": {"dir": "o"},
        **({"reward": {"functions": ["r.py:f"]}} if stage == "ppo" else {}),
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return check(values, stage)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-processes", "2"], "--num-processes: has no effect without --launch"),
        (["--launch", "dp", "--num-processes", "2"], "--launch: no such way: dp → use ddp, fsdp, tp, deepspeed"),
        (["--launch", "ddp"], "--num-processes: is missing"),
        (["--launch", "ddp", "--num-processes", "3", "--num-machines", "2"], "3 processes cannot be shared out over 2"),
        (["--launch", "ddp", "--num-processes", "2", "--machine-rank", "1"], "--machine-rank: has no effect on one"),
        (["--launch", "ddp", "--num-processes", "4", "--num-machines", "2", "--main-address", "a"],
         "--machine-rank: is needed with several machines"),
        (["--launch", "ddp", "--num-processes", "4", "--num-machines", "2", "--machine-rank", "0"],
         "--main-address: is needed with several machines"),
        (["--launch", "ddp", "--num-processes", "4", "--num-machines", "2", "--machine-rank", "2",
          "--main-address", "a"], "--machine-rank: 2 is none of 0 to 1"),
        (["--launch", "ddp", "--num-processes", "4", "--num-machines", "2", "--machine-rank", "1",
          "--main-address", "x" * 70], "is not known here"),
        (["--launch", "ddp", "--num-processes", "0"], "'--num-processes': Input should be greater than or equal to 1"),
        (["--launch", "ddp", "--num-processes", "-1"], "'--num-processes': Input should be greater than or equal to 1"),
        (["--launch", "ray", "--num-processes", "2", "--main-port", "5"], "--main-port: Ray knows its machines"),
        (["--launch", "fsdp", "--num-processes", "2", "--zero", "3"], "--zero: is deepspeed's"),
        (["--launch", "ddp", "--num-processes", "2", "--offload"], "--offload: has nothing to keep elsewhere"),
        (["--launch", "cp", "--num-processes", "2"], "--launch: context parallelism is not offered"),
        (["--launch", "sp", "--num-processes", "2"], "--launch: sequence parallelism is not offered"),
        (["--launch", "tp", "--num-processes", "4", "--num-machines", "2"], "--num-machines: the processes wait for"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together(words: list[str], said: str, tmp_path: Path) -> None:
    done = ft("sft", "no_such_recipe", *words, cwd=tmp_path)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("machines", [1, 2])
def test_a_port_in_use(machines: int) -> None:
    several: tuple[Any, ...] = (None, None, None) if machines == 1 else (2, 0, "127.0.0.1")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(UserError, match=r"--main-port: port \d+ cannot be listened at .* another one"):
            launching.given("ddp", 2, *several, other.getsockname()[1])
        if machines == 2:  # the second only connects to it
            assert launching.given("ddp", 2, 2, 1, "127.0.0.1", other.getsockname()[1]) is not None


@pytest.mark.parametrize(
    ("kind", "processes", "sections", "said"),
    [
        ("ddp", 3, {}, "train.effective_batch_size: effective_batch_size of 16 cannot be shared out evenly over 3"),
        ("ddp", 2, {"train": {"per_device_train_batch_size": 16}}, "per_device_train_batch_size: 16 rows in each"),
        ("ddp", 4, {"train": {"gradient_accumulation_steps": 2}}, "train.gradient_accumulation_steps: 2 passes"),
        ("ddp", 2, {"model": {"device_map": "auto"}}, "model.device_map: spreads one model"),
        ("ddp", 2, {"train": {"auto_find_batch_size": True}}, "train.auto_find_batch_size: starts the process anew"),
        ("ddp", 2, {"stage": "dpo", "dpo": {"loss_type": "aot"}}, "dpo.loss_type: aot sorts all pairs"),
        ("fsdp", 2, {"stage": "ppo"}, "--launch: --launch fsdp shares out the weights"),
        ("fsdp", 2, {"adapter": {"method": "adalora"}}, "adapter.method: adalora has not been tried"),
        ("fsdp", 2, {"train": {"optim": "muon"}}, "train.optim: muon"),
        ("fsdp", 2, {"model": {"quantization": "int8"}}, "model.quantization: --launch fsdp shards int4 only"),
        ("fsdp", 2, {"adapter": {"method": "lora", "init_lora_weights": "pissa"}}, "adapter.init_lora_weights: starts"),
        ("tp", 2, {"stage": "ppo"}, "--launch: --launch tp shares out the weights"),
        ("tp", 2, {"adapter": {"method": "ia3"}}, "adapter.method: ia3 has not been tried with --launch tp"),
        ("tp", 2, {"adapter": {"method": "lora", "lora_dropout": 0.1}}, "adapter.lora_dropout: each process"),
        ("tp", 2, {"adapter": {"method": "lora", "use_dora": True}}, "adapter.use_dora: has not been tried"),
        ("tp", 2, {"adapter": {"method": "lora", "modules_to_save": ["lm_head"]}}, "adapter.modules_to_save: has not"),
        ("tp", 2, {"train": {"optim": "muon"}}, "train.optim: muon"),
        ("tp", 2, {"train": {"torch_compile": True}}, "train.torch_compile: has not been tried"),
        ("tp", 2, {"train": {"neftune_noise_alpha": 5.0}}, "train.neftune_noise_alpha: has not been tried"),
        ("tp", 2, {"model": {"quantization": "int4"}}, "model.quantization: weights in int4 are packed"),
        ("tp", 2, {"model": {"dtype": "float16"}}, "model.dtype: whether the gradients of a step are finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(kind: str, processes: int, sections: Any, said: str) -> None:
    asked = recipe(sections.get("stage", "sft"), **{k: v for k, v in sections.items() if k != "stage"})
    launching.check(asked, kind, 1)
    with pytest.raises(UserError) as caught:
        launching.check(asked, kind, processes)
    assert said in str(caught.value)


def test_rows_are_shared_out_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all compute a pass together, a step need not divide by their number."""
    launching.check(recipe(), "tp", 3)
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", ranks.KIND: "ddp"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.shares(), ranks.share()) == (3, 2)
    monkeypatch.setenv(ranks.KIND, "tp")
    assert (ranks.shares(), ranks.share()) == (1, 0)


@pytest.mark.parametrize("name", launching.OTHERS)
def test_processes_that_know_nothing_of_each_other(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    launching.check_environment()
    monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"{name}: this is one of 2 processes of {launching.OTHERS[name]}"):
        launching.check_environment()
    launching.check_environment(launching.Launch("ddp", 4, machines=2, machine_rank=1))  # one for each machine


def test_another_launcher_says_all_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK: is not set in one of 2 processes"):
        launching.check_environment()
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    launching.check_environment()
    assert (ranks.count(), ranks.first(), ranks.kind()) == (2, False, "ddp")
    with pytest.raises(UserError, match="--launch: another launcher has started this process already"):
        launching.given("ddp", 2, None, None, None, None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP: accelerate's own configuration of fsdp is not read"):
        launching.check_environment()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_PARALLELISM_CONFIG: tensor, sequence, context and pipeline"):
        launching.check_environment()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "2"}, "RANK: 2 is none of 0 to 1"),
        ({"RANK": "first"}, "RANK: first is none of 0 to 1"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK: 1 is none of 0 to 0"),
        ({"LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE: 2 processes are not as many on every machine"),
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE: 3 processes are not as many"),
        ({"MASTER_PORT": None}, "MASTER_PORT: is not set in one of 2 processes"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: 99999 is no port"),
        ({"MASTER_PORT": "tcp://10.0.0.1:1"}, "MASTER_PORT: tcp://10.0.0.1:1 is no port"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS: 4 is accelerate's"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "set train.torch_compile in the recipe"),
    ],
)
def test_what_a_shell_or_launcher_has_left(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], said: str
) -> None:
    whole = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**whole, "ACCELERATE_DYNAMO_BACKEND": "NO", **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launching.check_environment()
    assert said in str(caught.value)


def test_precision_is_the_recipe_s(monkeypatch: pytest.MonkeyPatch) -> None:
    launching.check_precision(recipe())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    launching.check_precision(recipe(model={"dtype": "bfloat16"}))
    with pytest.raises(UserError, match=r"bf16, where model\.dtype is float32 → set model\.dtype: bfloat16"):
        launching.check_precision(recipe(model={"dtype": "float32"}))


def test_one_process_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a shell that was one of several has left: the first is the only one, and nobody is waited for."""
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert (ranks.first(), ranks.local_rank()) == (True, 0)
    done = ft("sft", "no_such_recipe", cwd=tmp_path)
    assert (done.returncode, "no_such_recipe" in done.stderr) == (2, True)
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} & os.environ.keys()


class Said:
    """torch's store, of a machine where somebody has said something `before`; broken without."""

    def __init__(self, before: int | None) -> None:
        self.before = before

    def check(self, keys: list[str]) -> bool:
        if self.before is None:
            raise RuntimeError("Connection reset by peer")
        return self.before > 0

    def add(self, key: str, more: int) -> int:
        if self.before is None:
            raise RuntimeError("Connection reset by peer")
        self.before += more
        return self.before


@pytest.mark.parametrize(("before", "heard"), [(0, True), (1, False), (None, False)])
def test_what_only_one_process_finds_is_said(monkeypatch: pytest.MonkeyPatch, before: int | None, heard: bool) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_store", [Said(before)])
    monkeypatch.setattr(ranks, "_streams", [])
    monkeypatch.setattr(ranks, "TURN", 0.0 if before == 0 else 5.0)
    assert ranks.heard(UserError("a file is not there")) is heard
    monkeypatch.setattr(ranks, "_store", [Said(before)])
    assert ranks.heard(RunError("loss became nan at step 2")) is heard, "as the mean over all processes is in each"
    assert not ranks.heard(ranks.Lost("another one has ended"))
    assert ranks.heard(RuntimeError("anything else"))


def test_who_is_not_heard_stays_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch writes pages of its own where the first process, which it asks, has ended."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_store", [Said(None)])
    restored: list[int] = []
    monkeypatch.setattr(ranks, "_streams", [7, 8])
    monkeypatch.setattr(
        ranks, "os", SimpleNamespace(environ=os.environ, dup2=lambda kept, number: restored.append(number))
    )
    assert not ranks.heard(UserError("a file is not there"))
    assert not restored
    assert ranks.heard(RuntimeError("anything else"))
    assert restored == [1, 2]


WAITS = """
import atexit, sys, threading
from finetune import ranks
atexit.register(lambda: print("Python ends", flush=True))
try:
    ranks.interruptible(lambda: (print("waits", flush=True), threading.Event().wait()))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_signal_ends_a_wait_for_others() -> None:
    """The first process may be reading data for hours."""
    waiting = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    with waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "waits\n"
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        assert not waiting.stdout.read(), "torch would abort the process"
    assert ranks.interruptible(lambda: 5) == 5
    with pytest.raises(ValueError, match="what it says"):
        ranks.interruptible(lambda: int("what it says"))


@pytest.mark.parametrize(
    ("codes", "asked", "said", "code"),
    [
        ({1: 130}, [], "process 1 of 2 was interrupted, and the others end with it", 130),
        ({0: 75, 1: 130}, [], "process 1 of 2 was interrupted", 130),
        ({0: 130, 1: 130}, [], "", 130),  # at the same step, and the first has said so
        ({0: 130, 1: 130}, [15], "", 130),
        ({0: -15, 1: -15}, [15], "interrupted", 130),  # before they had begun
        ({0: -9, 1: -9}, [15, 15, 15, 9], "interrupted", 130),
        ({0: 75, 1: -9}, [15], "process 1 of 2 was ended by SIGKILL", 1),
        ({1: -15}, [], "process 1 of 2 was ended by SIGTERM", 1),
        ({0: 75}, [], "", 1),
    ],
)
def test_who_ended_the_others_is_said(
    capsys: pytest.CaptureFixture[str], codes: dict[int, int], asked: list[int], said: str, code: int
) -> None:
    from finetune.commands.launch import told

    assert told(codes, launching.Launch("ddp", 2), asked) == code
    err = capsys.readouterr().err
    assert err.startswith(said) if said else not err


def test_the_last_words_of_a_process_that_aborts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """torch and NCCL say on stderr why they abort, where nobody but the first process is heard."""
    from finetune.commands.launch import LINES, MOST_KEPT, last_lines, shorten, told

    code = "import os; from finetune import ranks; ranks.hush(); print('out', flush=True)\n"
    code += f"for i in range({LINES}): os.write(2, b'line %d\\n' % i)\nos.write(2, b'terminate called\\n'); os.abort()"
    file = tmp_path / "1.txt"
    said = {"RANK": "1", "WORLD_SIZE": "2", ranks.SAID: str(file)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **said}, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGABRT, b"", b"")
    shorten([file, tmp_path / "none.txt"])
    assert told({1: -signal.SIGABRT}, launching.Launch("ddp", 2), (), {1: last_lines(file)}) == 1
    lines = [f"process 1: line {i}" for i in range(1, LINES)]
    shown = ["process 1 of 2 was ended by SIGABRT, and the others with it", *lines, "process 1: terminate called"]
    assert capsys.readouterr().err.splitlines() == shown
    file.write_bytes(b"x" * (MOST_KEPT + 1))
    shorten([file])
    assert last_lines(file) == []


class Starting:
    """A process in which Python, and not yet ft, gets the signals; the first look at it is where Ctrl-C comes."""

    code: int | None = None
    looked = False

    def poll(self) -> int | None:
        if not self.looked:
            self.looked = True
            os.kill(os.getpid(), signal.SIGINT)
        return self.code

    def send_signal(self, number: int) -> None:
        self.code = -number


def test_ctrl_c_before_a_process_has_begun(capsys: pytest.CaptureFixture[str]) -> None:
    """Python would show a traceback for SIGINT."""
    from finetune.commands.launch import watched

    process, context = Starting(), SimpleNamespace(close=lambda *_, **__: None)
    assert watched([process], context, launching.Launch("ddp", 1)) == 130
    assert process.code == -signal.SIGTERM
    assert capsys.readouterr().err == "interrupted\n"


def test_the_command_that_starts_again_has_the_launcher_s_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finetune.cli.check_processes", interrupted)
    monkeypatch.setenv(ranks.WORDS, "--launch ddp --num-processes 2")
    for words in (["sft", "r.yaml"], ["sft", "r.yaml", "--launch", "ddp", "--num-processes", "2"]):
        assert ft(*words).stderr == "interrupted; start again with ft sft r.yaml --launch ddp --num-processes 2\n"


def test_a_launcher_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell may have kept its variable."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune", "sft", "none.yaml"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "FT_LAUNCH_PID": "1", "PYTHONPATH": str(Path(ranks.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, "unset FT_LAUNCH_PID" in done.stderr) == (75, True)


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or another program is there."""
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        place = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(ranks, "MEETING", timedelta(seconds=1))
        other.listen()
        with pytest.raises(UserError, match=f"localhost:{port} is in use by another program"):
            ranks.met()
    with pytest.raises(UserError, match=f"2 processes were to meet at localhost:{port}, and did not"):
        ranks.met()


ORPHAN = """
import os, subprocess, sys, time
if len(sys.argv) > 1:
    from finetune import ranks
    ranks.end_with_launcher()
    print(os.getpid(), flush=True)
    time.sleep(60)
subprocess.Popen([sys.executable, __file__, "child"], env={**os.environ, "FT_LAUNCH_PID": str(os.getpid())})
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl(PR_SET_PDEATHSIG) is of Linux alone")
def test_processes_end_with_their_launcher(tmp_path: Path) -> None:
    """Also when it is killed."""
    (tmp_path / "job.py").write_text(ORPHAN)
    launcher = subprocess.Popen([sys.executable, tmp_path / "job.py"], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher, launcher.stdout:
        child = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        child.wait(30)


def test_every_process_has_the_same_recipe() -> None:
    """Folders may have other names on other machines."""
    from finetune.training.inputs import asked_of_all

    one = asked_of_all(recipe(data={"train": "/a/d"}))
    assert one == asked_of_all(recipe(data={"train": "/b/d"}))
    other = asked_of_all(recipe(data={"train": "/a/d"}, train={"learning_rate": 3e-4}))
    assert [key for key, value in other.items() if one[key] != value] == ["train.learning_rate"]


def test_parts_of_deepspeed_fit_no_others() -> None:
    from finetune.training.sharded import check_zero

    two = {"launch": "deepspeed", "processes": "2"}
    check_zero(two, two)
    check_zero({}, {"launch": "ddp", "processes": "1"})
    for then, now in ((two, {**two, "processes": "4"}), (two, {**two, "launch": "ddp"}), ({}, two)):
        with pytest.raises(UserError, match="DeepSpeed's parts fit no others"):
            check_zero(then, now)


def test_what_several_would_do_several_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = ft("eval", "run", cwd=tmp_path)
    assert (done.returncode, "WORLD_SIZE: ft eval works in one process" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("words", [["eval", "run", "--launch", "ddp"], ["plan", "recipe.yaml", "--launch=fsdp"]])
def test_what_one_process_does(words: list[str], tmp_path: Path) -> None:
    done = ft(*words, cwd=tmp_path)
    assert (done.returncode, f"--launch: ft {words[0]} works in one process" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("train", [{}, {"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 4}])
def test_a_step_is_the_same_for_any_number_of_processes(train: dict[str, int], processes: int) -> None:
    """Also when the complete recipe of one run goes on with another number of them."""
    asked = recipe(train=train)
    for number in (processes, 1):
        asked = resolve(asked, Hardware(processes=number))
        rows, passes = asked.train.per_device_train_batch_size, asked.train.gradient_accumulation_steps
        assert rows is not None
        assert passes is not None
        assert rows * passes == asked.train.effective_batch_size == 16


def test_every_process_is_told_its_place() -> None:
    from finetune.commands.launch import environment

    launch = launching.given("fsdp", 4, 2, 1, "10.0.0.1", None)
    assert launch is not None
    told = [environment(launch, local) for local in range(2)]
    assert [(each["RANK"], each["LOCAL_RANK"], each["GROUP_RANK"]) for each in told] == [
        ("2", "0", "1"),
        ("3", "1", "1"),
    ]
    assert {each["WORLD_SIZE"] for each in told} == {"4"}
    assert told[0]["MASTER_ADDR"] == "10.0.0.1"
    words = told[0][ranks.WORDS].split()
    assert launching.Launch(words[1], int(words[3]), int(words[5]), int(words[7]), words[9], int(words[11])) == launch
