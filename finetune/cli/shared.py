"""What the commands of the command line share: their options, and what they do before the libraries are imported."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Annotated, Any, NoReturn

import typer

from finetune.child import PART, python_path
from finetune.cli import completion
from finetune.errors import UserError

MOST, SEEDS = (1 << 31) - 1, (1 << 32) - 1  # as in recipes; larger ones end in an overflow somewhere
RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help="The same as --recipe.", autocompletion=completion.recipes),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Recipe file, or a shipped recipe's name.", autocompletion=completion.recipes),
]
Override = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeats.", autocompletion=completion.settings),
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Run directory (instead of output.dir).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what ft wrote there, once the new is complete.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the complete recipe, write nothing.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Built-in base, local folder or hub id.", autocompletion=completion.bases),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", help="Run directory or adapter folder.", autocompletion=completion.runs_or_folders),
]
Answering = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN|ADAPTER|MODEL", help="What answers, known by its content.",
        autocompletion=completion.answering,
    ),
]  # fmt: skip
Adapters = Annotated[
    list[str],
    typer.Option(
        "--adapter", metavar="[NAME=]ADAPTER", help="Run or adapter, called NAME; repeats.",
        autocompletion=completion.runs_or_folders,
    ),
]  # fmt: skip
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest that hold so much.", max=1.0)]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 from all.", min=0, max=MOST)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 against repeating.")]
Thinking = Annotated[
    str | None,
    typer.Option(
        metavar="on|off",
        help="Ask a thinking model to think or not to; by default as trained.",
        autocompletion=completion.listed("on", "off"),
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", help="0 answers greedily, above it answers are drawn; the recipe's by default.", min=0.0
    ),
]
KINDS = "ddp|fsdp|tp|deepspeed|ray"
Kind = Annotated[str | None, typer.Option("--launch", metavar=KINDS, help="In several processes.")]
Processes = Annotated[int | None, typer.Option("--num-processes", help="Of all machines together.", min=1, max=MOST)]
Machines = Annotated[int | None, typer.Option("--num-machines", help="Each has its share of them.", min=1, max=MOST)]
MachineRank = Annotated[int | None, typer.Option("--machine-rank", help="Which this one is, from 0.", min=0, max=MOST)]
MainAddress = Annotated[str | None, typer.Option("--main-address", help="Of the machine with rank 0.")]
MainPort = Annotated[int | None, typer.Option("--main-port", help="There; 29500 by default.", min=1, max=65535)]
Zero = Annotated[int | None, typer.Option("--zero", help="Stage of deepspeed, 2 by default.", min=2, max=3)]
Offload = Annotated[bool, typer.Option("--offload", help="fsdp, deepspeed: keep what waits in main memory.")]

VERBOSE = False


def quiet(bars: bool = True) -> None:
    """Before the first import of torch; without `bars` before what needs no transformers."""
    from finetune.terminal import noise

    if not VERBOSE:
        noise.silence()
        if bars:
            noise.silence_bars()


def warn_if(message: str | None) -> None:
    from finetune.terminal.progress import warn

    if message is not None:
        warn(message)


def module(name: str) -> ModuleType:
    """finetune.commands.NAME; importing the libraries takes seconds."""
    from finetune.terminal.progress import task

    with task("importing the libraries", after=1.0):
        return importlib.import_module(f"finetune.commands.{name}")


def meeting() -> AbstractContextManager[Any]:
    """What is shown while the other processes have not come."""
    from finetune.terminal.progress import task

    return task(f"waiting for the other processes at {os.environ.get('MASTER_ADDR')}", after=5.0)


def one_of(plain: str | None, option: str | None, name: str, usage: str) -> str:
    """What was given as a plain argument or as the option `name`. UserError for both and for neither."""
    if plain is not None and option is not None:
        raise UserError(f"given twice: {plain} and {name} {option}", fix="give one of them")
    given = option if plain is None else plain
    if not given:
        raise UserError(f"{name} is missing", fix=f"write {usage}")
    return given


def needs(there: bool, name: str, **given: bool) -> None:
    """UserError for options that say something of the option `name`, which is not there."""
    for option, said in given.items():
        if said and not there:
            raise UserError(f"has no effect without {name}", key=option, fix=f"leave it out, or give {name}")


def pairs(listed: list[str], key: str) -> dict[str, str]:
    """NAME=VALUE, each; UserError for what is none."""
    found = {}
    for text in listed:
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise UserError(f"{text!r} is no NAME=COLUMN", key=key, fix="write prompt=question_text")
        found[name] = value
    return found


def replace_process(words: list[str]) -> NoReturn:
    """`ft words …` in the place of this process: what it holds of memory, on the GPU too, is given back."""
    before = [word for word in sys.argv[1:] if word in (PART, "--debug", "--verbose")]
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ["PYTHONPATH"] = python_path()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "finetune", *before, *words])
