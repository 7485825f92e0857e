"""What `--launch` asks for, and what cannot be trained in several processes: refused by name before anything loads."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import ranks
from finetune.adapters.compatibility import tensor_parallel
from finetune.errors import Problem, UserError
from finetune.recipe.resolve import processes_problem
from finetune.recipe.stages import DpoRecipe, KtoRecipe, PpoRecipe, Recipe

KINDS = ("ddp", "fsdp", "tp", "deepspeed", "ray")
UNTRIED = {
    "cp": "context parallelism is not offered: torch 2.13 has it for CUDA's kernels of attention alone",
    "sp": "sequence parallelism is not offered: accelerate 1.15 has it as a part of DeepSpeed alone",
}
"""What accelerate has, and cannot be compared with one process here (docs/scaling.md)."""
SHARDED = ("lora", "full")
"""Methods whose weights have been trained in shards and gone on with."""
OPTIMIZERS = ("adamw", "sgd")
OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun", "MV2_COMM_WORLD_SIZE": "mpirun",
          "SLURM_STEP_NUM_TASKS": "srun"}  # fmt: skip
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}
PORT = 29500


@dataclass(frozen=True)
class Launch:
    kind: str
    processes: int
    machines: int = 1
    machine_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int = PORT
    zero: int | None = None
    offload: bool = False

    def words(self) -> list[str]:
        """As they are typed."""
        several = ["--num-machines", self.machines, "--machine-rank", self.machine_rank, "--main-address",
                   self.main_address, "--main-port", self.main_port]  # fmt: skip
        found = ["--launch", self.kind, "--num-processes", self.processes, *(several if self.machines > 1 else [])]
        found += ["--zero", self.zero] if self.zero else []
        found += ["--offload"] if self.offload else []
        return [str(word) for word in found]


def given(
    kind: str | None, processes: int | None, machines: int | None, machine_rank: int | None, address: str | None,
    port: int | None, zero: int | None = None, offload: bool = False,
) -> Launch | None:  # fmt: skip
    """UserError for options that do not fit together; None without --launch."""
    options = {
        "--num-processes": processes, "--num-machines": machines, "--machine-rank": machine_rank,
        "--main-address": address, "--main-port": port, "--zero": zero, "--offload": offload or None,
    }  # fmt: skip
    if kind is None:
        for name, value in options.items():
            if value is not None:
                raise UserError("has no effect without --launch", key=name, fix="write --launch ddp, or leave it out")
        return None
    if kind in UNTRIED:
        raise UserError(UNTRIED[kind], key="--launch", fix="use tp, fsdp, or a smaller data.max_length")
    if kind not in KINDS:
        raise UserError(f"no such way: {kind}", key="--launch", fix=f"use {', '.join(KINDS)}")
    if zero and kind != "deepspeed":
        raise UserError("is deepspeed's", key="--zero", fix="leave it out, or use --launch deepspeed")
    if offload and kind not in ("fsdp", "deepspeed"):
        raise UserError("has nothing to keep elsewhere", key="--offload", fix="leave it out, or use --launch fsdp")
    if "RANK" in os.environ and ranks.count() > 1:
        what = "another launcher has started this process already"
        raise UserError(what, key="--launch", fix="leave it out, or start ft by itself")
    if processes is None:
        raise UserError("is missing", key="--num-processes", fix="give the number of all processes, one for each GPU")
    machines = machines or 1
    if processes % machines:
        what = f"{processes} processes cannot be shared out over {machines} machines"
        raise UserError(what, key="--num-processes", fix="give the number of all processes, of all machines together")
    if kind == "ray":
        for name in ("--num-machines", "--main-port"):
            if options[name] not in (None, 1):
                what = "Ray knows its machines, and shares the processes out by itself"
                raise UserError(what, key=name, fix="leave it out")
    if kind == "tp" and machines > 1:
        what = "the processes wait for each other in every layer, which has been tried on one machine only"
        raise UserError(what, key="--num-machines", fix="leave it out, or use --launch fsdp")
    if machines == 1:
        for name in ("--machine-rank", "--main-address"):
            if options[name]:
                raise UserError("has no effect on one machine", key=name, fix="leave it out, or give --num-machines")
        if port is not None:
            check_port(port)
        return Launch(kind, processes, main_port=port or free_port(), zero=zero, offload=offload)
    if machine_rank is None or address is None:
        name = "--machine-rank" if machine_rank is None else "--main-address"
        fix = "0 on the first machine, 1 on the next" if machine_rank is None else "give the first machine's address"
        raise UserError("is needed with several machines", key=name, fix=fix)
    if machine_rank >= machines:
        what = f"{machine_rank} is none of 0 to {machines - 1}"
        raise UserError(what, key="--machine-rank", fix="count from 0")
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):
        fix = "give the name or IP address that the other machines know the first one by"
        raise UserError(f"{address} is not known here", key="--main-address", fix=fix) from None
    if machine_rank == 0:
        check_port(port or PORT)
    return Launch(kind, processes, machines, machine_rank, address, port or PORT, zero, offload)


def words(
    stage: str, reference: str, settings: Sequence[str], output: str | None, resume: bool, overwrite: bool, dry: bool
) -> list[str]:
    """The command line of each of the processes."""
    flags = {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry}
    given = [part for item in settings for part in ("--set", item)] + (["--output", output] if output else [])
    return [stage, "--recipe", reference, *given, *(name for name, wanted in flags.items() if wanted)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def check_port(port: int) -> None:
    """UserError where another program listens."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a minute ago is free
        try:
            tried.bind(("", port))
        except OSError as error:
            reason = f"port {port} cannot be listened at ({error.strerror})"
            raise UserError(reason, key="--main-port", fix="give another one on every machine") from None


def check_environment(launch: Launch | None = None) -> None:
    """UserError in one of several processes that a launcher started which says nothing of an address, and for what
    a launcher says and nobody heeds.

    launch: what was asked for, for each of several machines by a process of its own.
    """
    for name, launcher in OTHERS.items():
        if launch is not None and launch.machines == ranks.number(name, 1):
            continue
        if ranks.number(name, 1) > 1 and "RANK" not in os.environ:
            raise UserError(
                f"this is one of {ranks.number(name, 1)} processes of {launcher}, which say nothing of each other",
                key=name, fix="use ft … --launch ddp --num-processes N, torchrun or accelerate launch",
            )  # fmt: skip
    check_accelerate()
    if ranks.count() == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            fix = "use ft … --launch ddp --num-processes N, torchrun or accelerate launch"
            raise UserError(f"is not set in one of {ranks.count()} processes", key=name, fix=f"{fix}; {ALONE}")
    here = ranks.on_this_machine()
    for name, most in (("RANK", ranks.count()), ("LOCAL_RANK", here)):
        if not os.environ[name].isdigit() or ranks.number(name, 0) >= most:
            raise UserError(f"{os.environ[name]} is none of 0 to {most - 1}", key=name, fix=ALONE)
    if not 0 < ranks.number("MASTER_PORT", 0) < 1 << 16:
        raise UserError(f"{os.environ['MASTER_PORT']} is no port (1 to 65535)", key="MASTER_PORT", fix=ALONE)
    if ranks.count() % here or (here == ranks.count() and ranks.rank() != ranks.local_rank()):
        what = f"{ranks.count()} processes are not as many on every machine"
        raise UserError(what, key="LOCAL_WORLD_SIZE", fix="start as many on each, with torchrun or ft … --launch")
    if ranks.kind() not in KINDS:
        raise UserError(f"no such way: {ranks.kind()}", key=ranks.KIND, fix=f"use {', '.join(KINDS)}")


ALONE = "unset WORLD_SIZE and RANK where no launcher has set them"


def check_accelerate() -> None:
    """UserError for what accelerate's own configuration asks for and a recipe or `--launch` says."""
    if ranks.KIND in os.environ:
        return

    def asked(name: str) -> bool:
        return os.environ.get(name, "").lower() in ("1", "true")

    for name, kind in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")):
        if asked(name):
            fix = f"use ft … --launch {kind} --num-processes N, which sets it up, or a configuration without"
            raise UserError(f"accelerate's own configuration of {kind} is not read", key=name, fix=fix)
    for name in ("ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM"):
        if asked(name):
            what = "tensor, sequence, context and pipeline parallelism are not read from accelerate's configuration"
            raise UserError(what, key=name, fix="use one without, or ft … --launch tp or fsdp --num-processes N")
    for name, key in (("GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps"),
                      ("DYNAMO_BACKEND", "torch_compile")):  # fmt: skip
        value = os.environ.get(f"ACCELERATE_{name}", "no")
        if value.lower() not in ("no", "1", ""):
            fix = f"set train.{key} in the recipe, and take it out of accelerate's configuration"
            raise UserError(f"{value} is accelerate's, and the recipe says it", key=f"ACCELERATE_{name}", fix=fix)


def check_precision(recipe: Recipe) -> None:
    """UserError where accelerate's configuration says another precision than the recipe."""
    name = "ACCELERATE_MIXED_PRECISION"
    value = os.environ.get(name, "no").lower()
    if ranks.KIND in os.environ or value in ("no", "") or PRECISIONS.get(value) == recipe.model.dtype:
        return
    wanted = PRECISIONS.get(value)
    fix = "use accelerate launch --mixed_precision no"
    if wanted is not None:
        fix = f"set model.dtype: {wanted}, or use accelerate launch --mixed_precision no"
    raise UserError(f"{value}, where model.dtype is {recipe.model.dtype}", key=name, fix=fix)


def check(recipe: Recipe, kind: str, processes: int) -> None:
    """UserError with everything in the recipe that cannot be done so."""
    problems = list(_problems(recipe, kind, processes))
    if problems:
        raise UserError(problems)


def _problems(recipe: Recipe, kind: str, processes: int) -> Iterator[Problem]:
    by = f"--launch {kind}"
    if kind == "ray":
        if importlib.util.find_spec("ray") is None:
            yield Problem("ray is not installed", key="--launch", fix="pip install 'ft-recipes[ray]', or use ddp")
        kind = "ddp"
    if kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        yield Problem("deepspeed is not installed", key="--launch", fix="pip install deepspeed, or use fsdp")
    if processes == 1:
        return
    if (found := processes_problem(recipe, 1 if kind == "tp" else processes)) is not None:
        yield found
    if recipe.model.device_map is not None:
        what = "spreads one model over the devices, and each of the processes has one of its own"
        yield Problem(what, key="model.device_map", fix="leave it out, or leave out --launch")
    if recipe.train.auto_find_batch_size:
        what = "starts the process anew when memory runs out, and the others would wait for it"
        yield Problem(what, key="train.auto_find_batch_size", fix="set train.per_device_train_batch_size")
    sorts = getattr(getattr(recipe, "dpo", None), "loss_type", "")
    if sorts in ("aot", "aot_unpaired"):
        what = f"{sorts} sorts all pairs of a step, and each process has a part of them"
        yield Problem(what, key="dpo.loss_type", fix="use another one, or one process")
    if kind != "ddp" and isinstance(recipe, PpoRecipe):
        what = f"{by} shares out the weights, and PPO's models write answers with all of them"
        yield Problem(what, key="--launch", fix="use ddp")
    elif kind != "ddp":
        yield from _sharded(recipe, kind, by)


def _sharded(recipe: Recipe, kind: str, by: str) -> Iterator[Problem]:
    """What does not go with weights that lie in parts."""
    method: Any = recipe.adapter.method
    if kind == "tp":
        yield from tensor_parallel(recipe)
    elif method not in SHARDED:
        yield Problem(f"{method} has not been tried with {by}", key="adapter.method", fix=f"use {', '.join(SHARDED)}")
    if recipe.train.optim not in OPTIMIZERS:
        what = f"{recipe.train.optim} needs whole matrices or has not been tried with {by}"
        yield Problem(what, key="train.optim", fix=f"use {' or '.join(OPTIMIZERS)}")
    if recipe.model.quantization == "int8" and kind != "tp":
        yield Problem(f"{by} shards int4 only", key="model.quantization", fix="use int4, or --launch ddp")
    if recipe.train.torch_compile:
        yield Problem(f"has not been tried with {by}", key="train.torch_compile", fix="leave it out")
    if getattr(recipe.adapter, "init_lora_weights", "default") in ("pissa", "olora", "loftq", "corda", "eva"):
        what = f"starts that take weights out of the base have not been tried with {by}"
        yield Problem(what, key="adapter.init_lora_weights", fix="use default")
    if isinstance(recipe, DpoRecipe | KtoRecipe) and getattr(recipe, recipe.stage).start == "merge":
        yield Problem(f"has not been tried with {by}", key=f"{recipe.stage}.start", fix="merge first: ft merge")
