"""Several processes that train one model: which of them this is, and what they agree on.

A launcher (`ft … --launch`, torchrun, accelerate launch) sets RANK, LOCAL_RANK, WORLD_SIZE and the address of the
first. Without one there is one process, and everything here does nothing. The first process prints, locks and writes;
what one finds out for all is said over gloo, on the CPU, also where gradients go over NCCL.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from finetune.errors import FinetuneError, Interrupted, RunError, UserError

T = TypeVar("T")
KIND, WORDS, LAUNCHER, SAID = "FT_LAUNCH", "FT_LAUNCH_WORDS", "FT_LAUNCH_PID", "FT_LAUNCH_SAID"
"""Variables of `ft … --launch`: ddp, fsdp, tp or deepspeed, the options as they were typed, its process (also of a
command that runs a part of itself in another process), and a file for what a process that is not heard writes as its
errors."""
ACCELERATE = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")
"""What a recipe says, and `accelerate launch` says again (`early.launching` compares them)."""
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
         "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
"""What every launcher says to a process of torch."""
OURS = (*PLACE, KIND, WORDS, LAUNCHER, SAID)
MEETING = timedelta(minutes=10)
"""How long they may take to come together, one machine after the other."""
PATIENCE = timedelta(hours=2)
"""How long one waits for the others: the first may be reading data. One that has died is noticed at once."""


class Lost(FinetuneError):
    """Another process of the run has ended: that one has said why."""

    exit_code = 75


def number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default


def count() -> int:
    return number("WORLD_SIZE", 1)


def rank() -> int:
    return number("RANK", 0) if count() > 1 else 0


def local_rank() -> int:
    return number("LOCAL_RANK", 0) if count() > 1 else 0


def on_this_machine() -> int:
    """How many of the processes."""
    return number("LOCAL_WORLD_SIZE", count())


def first() -> bool:
    """Whether this process prints, locks and writes."""
    return rank() == 0


def kind() -> str:
    return os.environ.get(KIND, "ddp")


def sharded() -> bool:
    """Whether each process holds a part of the weights only."""
    return count() > 1 and kind() != "ddp"


def side_by_side() -> bool:
    """Whether all processes compute every pass together, of the same rows: tensor parallelism."""
    return count() > 1 and kind() == "tp"


def shares() -> int:
    """How many shares the rows of a step are dealt out in: one for each process, but all of them work on the same rows
    where each has a part of every layer."""
    return 1 if side_by_side() else count()


def share() -> int:
    """Which of them this process works on."""
    return 0 if side_by_side() else rank()


def words() -> list[str]:
    """The options of the launcher, for a command line that is to be typed again."""
    return os.environ.get(WORDS, "").split()


def deepspeed_stage() -> int:
    given = words()
    return int(given[given.index("--zero") + 1]) if "--zero" in given else 2


def offloads() -> bool:
    """Whether main memory keeps what waits."""
    return "--offload" in words()


def forget() -> None:
    """In one process: what a launcher of one, or a shell that was one of several, has left, which torch and accelerate
    would wait by. What `--launch` said stays."""
    for name in PLACE:
        os.environ.pop(name, None)


def without() -> dict[str, str]:
    """The environment of a process that is none of them."""
    return {name: value for name, value in os.environ.items() if name not in (*OURS, *ACCELERATE)}


def end_with_launcher() -> None:
    """SIGTERM when what started this process (`ft … --launch`, or a command of which it is a part) has ended without a
    word to it, as when it is killed. On Linux."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
    if str(os.getppid()) != launcher:
        what = f"process {launcher}, which started this one, has ended"
        raise Lost(f"{what}; where none has started it: unset {LAUNCHER}")


def join(meeting: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Meet the others; only the first is heard from now on. UserError where they do not come.

    meeting: what is shown meanwhile.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    for name in ACCELERATE:
        os.environ.pop(name, None)
    hush()
    backend = "gloo"
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if on_this_machine() > devices:
            what = f"{on_this_machine()} processes want a GPU each, and this machine has {devices}"
            raise UserError(what, key="--num-processes", fix=f"start {devices} on each machine")
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():  # Ray has done it
        with meeting():
            _store.append(met())
        with broken():
            group = dist.PrefixStore("ft", _store[0])
            dist.init_process_group(backend, store=group, rank=rank(), world_size=count(), timeout=PATIENCE)
    with broken():
        if not _groups:
            _groups.update(cpu=dist.new_group(backend="gloo", timeout=PATIENCE))
            machines = count() // on_this_machine()
            for machine in range(machines):
                members = range(machine * on_this_machine(), (machine + 1) * on_this_machine())
                group = dist.new_group(list(members), backend="gloo", timeout=PATIENCE)
                if rank() in members:
                    _groups.update(machine=group)


def met() -> Any:
    """torch's store, where all have come together."""
    import torch.distributed as dist

    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        return interruptible(lambda: next(dist.rendezvous("env://", rank(), count(), timeout=MEETING))[0])
    except Exception as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            fix = "wait until the other run ends, or give another port"
            raise UserError(f"{place} is in use by another program", key="--main-port", fix=fix) from None
        what = f"{count()} processes were to meet at {place}, and did not"
        fix = "start the same command on every machine; alone: unset WORLD_SIZE and RANK"
        raise UserError(what, key="--main-address", fix=fix) from error


def interruptible(wait: Callable[[], T]) -> T:
    """`wait`, where a signal ends it: torch would let none through before the others come."""
    if threading.current_thread() is not threading.main_thread():  # which gets the signals
        return wait()
    found: list[T] = []
    errors: list[BaseException] = []
    over = threading.Event()  # join() takes a thread for ended when a signal comes, in Python 3.11

    def waits() -> None:
        try:
            found.append(wait())
        except BaseException as error:
            errors.append(error)
        over.set()

    def end_at_once() -> None:
        if not over.is_set():  # torch aborts where its wait is over while Python ends
            sys.stderr.flush()
            os._exit(Interrupted.exit_code)

    try:
        threading.Thread(target=waits, daemon=True).start()
        while not over.wait(0.2):
            pass
    except BaseException:
        atexit.register(end_at_once)
        raise
    if errors:
        raise errors[0]
    return found[0]


_groups: dict[str, Any] = {}
_store: list[Any] = []
"""Where they met."""


@contextmanager
def joined(made: Callable[[], T], meeting: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[T]:
    """`made`, of what takes seconds to import, among the others; the group is left at the end, by all together: who
    goes takes down connections from which another may still read. After an error it is not left: the others see that
    by the connection."""
    value = made()
    join(meeting)
    with broken():
        yield value
    barrier()
    leave()


def leave() -> None:
    dist = sys.modules.get("torch.distributed")
    if count() > 1 and dist is not None and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


# --- what is said ---

_streams: list[int] = []
_python_errors: list[TextIO] = []


def hush() -> None:
    """Only the first process is heard. What libraries of others write as errors, and not Python, is kept, for the case
    that a signal ends them."""
    if not first() and not _streams:
        _python_errors.append(sys.stderr)
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends, or is heard)
        _streams.extend(os.dup(number) for number in (1, 2))
        for number, place in ((1, os.devnull), (2, os.environ.get(SAID, os.devnull))):
            with open(place, "ab") as file:
                os.dup2(file.fileno(), number)


def heard(error: BaseException) -> bool:
    """Whether this process says what ended it: not that another has ended, nor what another of its machine has said,
    as all of one may find the same. It is heard from then on, and not before: torch itself writes where it asks."""
    if not _says(error):
        return False
    for number, kept in zip((1, 2), _streams, strict=False):
        os.dup2(kept, number)
    sys.stderr = _python_errors[0] if _python_errors else sys.stderr
    return True


def _says(error: BaseException) -> bool:
    if isinstance(error, Lost | Interrupted):
        return first() or (isinstance(error, Interrupted) and local_rank() == 0)
    found_by_all = isinstance(error, UserError) or (isinstance(error, RunError) and bool(_store))
    turn = said_first() if found_by_all else True
    return first() or turn


TURN = 5.0
"""Seconds that the first process of a machine has, to say what all of them have found."""


def said_first() -> bool:
    """Whether nobody of this machine has said something before; the first process gets its turn first."""
    if not _store:
        return local_rank() == 0
    key, end = f"said by machine {number('GROUP_RANK', 0)}", time.monotonic() + TURN
    try:
        while local_rank() and time.monotonic() < end:
            if _store[0].check([key]):
                return False
            time.sleep(0.1)
        return bool(_store[0].add(key, 1) == 1)
    except RuntimeError:  # the first process has ended, and has said why
        return False


def name() -> str:
    """What its lines begin with."""
    return "" if first() else f"process {rank()}: "


BROKEN = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|TCPStore|process group|recvValue|rendezvous", re.I
)


@contextmanager
def broken() -> Iterator[None]:
    """`Lost` in the place of what torch.distributed says when another process is gone."""
    try:
        yield
    except RuntimeError as error:  # its own errors are some of these
        if count() > 1 and (type(error).__name__.startswith("Dist") or BROKEN.search(str(error))):
            raise Lost("another process of this run has ended; the first to end says why") from error
        raise


# --- what they agree on ---


def barrier() -> None:
    from_first(lambda: None)


def from_first(make: Callable[[], T], group: str = "cpu") -> T:
    """What the first process makes of it, in all of them; the others wait. An error there ends it, and then them.

    group: `cpu` for all, `machine` for those of this machine.
    """
    if count() == 1:
        return make()
    import torch.distributed as dist

    source = 0 if group == "cpu" else rank() - local_rank()
    found = [make() if rank() == source else None]
    members = _groups[group]  # while it is waited for, the groups may be left

    def told() -> None:
        dist.broadcast_object_list(found, source, group=members)

    with broken():
        told() if rank() == source else interruptible(told)
    return found[0]  # type: ignore[return-value]


def once(make: Callable[[], T]) -> T:
    """The same, once on each machine: what is read from its disk."""
    return from_first(make, "machine")


def of_all(make: Callable[[], T]) -> T:
    """What a pass through the model shows: to the first process, as others may have no weights yet. Where they compute
    it together, all must take part."""
    if side_by_side():
        value = make()
        return from_first(lambda: value)
    return from_first(make)


def each(value: T) -> list[T]:
    """What is known of each share of the rows, in all processes. Of a share that several work on, what the first says:
    they may round differently, and must decide alike."""
    return [from_first(lambda: value)] if side_by_side() else every(value)


def every(value: T) -> list[T]:
    """What each process has, by rank, in all of them."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    with broken():
        dist.all_gather_object(found, value, group=_groups["cpu"])
    return found


def lists(own: Mapping[str, Sequence[T]]) -> dict[str, list[T]]:
    """What the processes have by name, one after the other."""
    every = each({key: list(values) for key, values in own.items()})
    keys = dict.fromkeys(key for values in every for key in values)
    return {key: [value for values in every for value in values.get(key, ())] for key in keys}


def total(value: float) -> float:
    """The sum over all shares of the rows, in double precision; added in the same order in each process."""
    return totals([value])[0]


def totals(values: list[float]) -> list[float]:
    if shares() == 1:
        return each(values)[0]
    return [float(value) for value in _summed(values)]


def mean(value: float) -> float:
    return total(value) / shares()


def any_of(flag: bool) -> bool:
    """Whether it is so in one of the processes."""
    return any(every(flag))


def _summed(values: list[float]) -> Any:
    import torch
    import torch.distributed as dist

    found = torch.tensor(values, dtype=torch.float64)
    with broken():
        dist.all_reduce(found, group=_groups["cpu"])
    return found


def same(value: Any, what: str, fix: str) -> None:
    """UserError where machines have not the same, e.g. files of one name and other content."""
    for other, theirs in enumerate(every(value)):
        if theirs != value:
            keys = [key for key in value if theirs.get(key) != value[key]] if isinstance(value, dict) else []
            said = f"{what} is not the same for process {other} and process {rank()}"
            raise UserError(said, key=keys[0] if keys else None, fix=fix)
