"""Several processes that train one model: which of them this is, and what they agree on.

A launcher (`ft … --launch`, torchrun, accelerate launch) sets RANK, LOCAL_RANK, WORLD_SIZE and the address of the
first. Without one there is one process, and everything here does nothing. The first process prints, locks and writes;
what one finds out for all is said over gloo, on the CPU, also where gradients go over NCCL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from finetune.errors import FinetuneError, Interrupted, UserError

T = TypeVar("T")
KIND, WORDS = "FT_LAUNCH", "FT_LAUNCH_WORDS"
"""Variables of `ft … --launch`: ddp, fsdp or deepspeed, and the options as they were typed."""
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", KIND, WORDS)
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
    return number("RANK", 0)


def local_rank() -> int:
    return number("LOCAL_RANK", 0)


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


def words() -> list[str]:
    """The options of the launcher, for a command line that is to be typed again."""
    return os.environ.get(WORDS, "").split()


def deepspeed_stage() -> int:
    given = words()
    return int(given[given.index("--zero") + 1]) if "--zero" in given else 2


def offloads() -> bool:
    """Whether main memory keeps what waits."""
    return "--offload" in words()


def without() -> dict[str, str]:
    """The environment of a process that is none of them."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def join() -> None:
    """Meet the others; only the first is heard from now on."""
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    # The recipe says how is computed, not the configuration of a launcher.
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND"):
        os.environ.pop(name, None)
    hush()
    backend = "gloo"
    if torch.cuda.is_available():
        devices = torch.cuda.device_count()
        if local_rank() >= devices:
            what = f"process {local_rank()} of this machine has no GPU of its own: {devices} are here"
            raise UserError(what, key="--num-processes", fix=f"start {devices} on each machine")
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    with broken():
        if not dist.is_initialized():  # Ray has done it
            dist.init_process_group(backend, timeout=PATIENCE)
        if not _groups:
            _groups.update(cpu=dist.new_group(backend="gloo", timeout=PATIENCE))
            machines = count() // on_this_machine()
            for machine in range(machines):
                members = range(machine * on_this_machine(), (machine + 1) * on_this_machine())
                group = dist.new_group(list(members), backend="gloo", timeout=PATIENCE)
                if rank() in members:
                    _groups.update(machine=group)


_groups: dict[str, Any] = {}


@contextmanager
def joined(made: Callable[[], T]) -> Iterator[T]:
    """`made`, of what takes seconds to import, among the others; the group is left at the end. After an error it is
    not: the others see that by the connection."""
    value = made()
    join()
    with broken():
        yield value
    leave()


def leave() -> None:
    import sys

    dist = sys.modules.get("torch.distributed")
    if count() > 1 and dist is not None and dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


# --- what is said ---

_streams: list[int] = []


def hush() -> None:
    """Only the first process is heard."""
    if not first() and not _streams:
        _streams.extend(os.dup(number) for number in (1, 2))
        with open(os.devnull, "wb") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)


def heard(error: BaseException) -> bool:
    """Whether this process says what ended it: not what all of a machine say, and not that another has ended."""
    for number, kept in zip((1, 2), _streams, strict=False):
        os.dup2(kept, number)
    alike = isinstance(error, UserError | Interrupted) and local_rank() > 0
    return first() or not (alike or isinstance(error, Lost))


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
    with broken():
        dist.broadcast_object_list(found, source, group=_groups[group])
    return found[0]  # type: ignore[return-value]


def once(make: Callable[[], T]) -> T:
    """The same, once on each machine: what is read from its disk."""
    return from_first(make, "machine")


def each(value: T) -> list[T]:
    """What each process has, by rank, in all of them."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * count()
    with broken():
        dist.all_gather_object(found, value, group=_groups["cpu"])
    return found


def total(value: float) -> float:
    """The sum over all processes, in double precision; added in the same order in each."""
    if count() == 1:
        return value
    return float(_summed([value])[0])


def totals(values: list[float]) -> list[float]:
    return values if count() == 1 else [float(value) for value in _summed(values)]


def mean(value: float) -> float:
    return total(value) / count()


def any_of(flag: bool) -> bool:
    """Whether it is so in one of them."""
    return total(float(flag)) > 0


def _summed(values: list[float]) -> Any:
    import torch
    import torch.distributed as dist

    found = torch.tensor(values, dtype=torch.float64)
    with broken():
        dist.all_reduce(found, group=_groups["cpu"])
    return found


def same(value: Any, what: str) -> None:
    """UserError where machines have not the same, e.g. files of one name and other content."""
    for other, theirs in enumerate(each(value)):
        if theirs != value:
            keys = [key for key in value if theirs.get(key) != value[key]] if isinstance(value, dict) else []
            raise UserError(
                f"{what} is not the same for process {other} and process {rank()}", key=keys[0] if keys else None,
                fix="put the same files on every machine, or use a folder that all of them share",
            )  # fmt: skip
