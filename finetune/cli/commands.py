"""All commands, and those that train. Each is a few lines; torch and the libraries are imported inside, so that help
answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import ranks
from finetune.cli import answering, completion, groups, merging, shared
from finetune.cli.examples import with_examples
from finetune.errors import Interrupted, OutOfMemory

if TYPE_CHECKING:
    from finetune.recipe.stages import Recipe

app = typer.Typer(
    name="ft",
    help="Fine-tune open language models from one YAML recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(groups.models_app, name="models")
app.add_typer(groups.recipes_app, name="recipes")
app.add_typer(groups.data_app, name="data")
app.add_typer(groups.runs_app, name="runs")


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the libraries print.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Read by `main`, which takes them anywhere on the line."""


TRAINING = {
    "pretrain": "Next-token training on raw text, of any model or of a new one.",
    "sft": "Supervised fine-tuning.",
    "reward": "Train a reward model on preference pairs.",
    "dpo": "Learn from preference pairs: DPO and its kin, SimPO, ORPO.",
    "kto": "Learn from answers labelled good or bad.",
    "ppo": "Reinforcement learning from a reward model or from rules: PPO on one base in memory.",
}


def training_command(stage: str) -> Callable[..., None]:
    """`ft STAGE --recipe R`: check everything that needs no torch, then run finetune.commands.STAGE."""

    def command(
        plain: shared.RecipeArgument = None,
        recipe: shared.RecipeOption = None,
        set_: shared.Override = [],  # noqa: B006 (typer copies it)
        output: shared.Output = None,
        resume: shared.Resume = False,
        overwrite: shared.Overwrite = False,
        dry_run: shared.DryRun = False,
        launch: shared.Kind = None,
        num_processes: shared.Processes = None,
        num_machines: shared.Machines = None,
        machine_rank: shared.MachineRank = None,
        main_address: shared.MainAddress = None,
        main_port: shared.MainPort = None,
        zero: shared.Zero = None,
        offload: shared.Offload = False,
    ) -> None:
        reference = shared.one_of(plain, recipe, "--recipe", f"ft {stage} RECIPE")
        shared.quiet(bars=False)
        from finetune.early import launching, training

        place = (num_machines, machine_rank, main_address, main_port)
        several = launching.given(launch, num_processes, *place, zero, offload)
        launching.check_environment(several)
        ranks.end_with_launcher()
        ranks.hush()

        checked: Recipe | None = None
        try:
            checked = training.recipe(reference, stage, set_, output, resume, overwrite, dry_run)
            launching.check_precision(checked)
            if several is not None:
                os.environ[ranks.WORDS] = " ".join(several.words())  # for a command that is to be typed again
                launching.check(checked, several.kind, several.processes)
                words = launching.words(stage, reference, set_, output, resume, overwrite, dry_run)
                shared.quiet()
                sys.exit(shared.module("launch").run(words, several))
            launching.check(checked, ranks.kind(), ranks.count())
            shared.quiet()
            shared.warn_if(training.gpu_missing(reference, checked))
            with ranks.joined(lambda: shared.module(stage), shared.meeting) as command_:
                command_.run(checked, resume=resume, overwrite=overwrite, dry_run=dry_run)
        except OutOfMemory as error:
            if error.smaller is None or checked is None:
                raise
            from finetune.run.resuming import to_go_on_smaller
            from finetune.terminal.progress import warn

            smaller = to_go_on_smaller(stage, reference, set_, output, checked, error.smaller)
            warn(f"{error.lines()[0].partition(': ')[0]}: going on with {', '.join(smaller.said)}")
            shared.replace_process(smaller.words)
        except KeyboardInterrupt:
            from finetune.run.resuming import to_start_again

            again = to_start_again(stage, reference, set_, output, resume, overwrite, dry_run, checked)
            raise Interrupted(f"interrupted before there was a checkpoint; start again with {again}") from None

    return command


def plan(
    plain: shared.RecipeArgument = None,
    recipe: shared.RecipeOption = None,
    gpu: Annotated[str | None, typer.Option(metavar="CARD|SIZE", help="24GB, 'RTX 4090', …; this machine.")] = None,
    set_: shared.Override = [],  # noqa: B006
    json_: groups.JsonOption = None,
) -> None:
    """What a recipe needs before it is run: memory by part, time, what fits, what would make it fit."""
    reference = shared.one_of(plain, recipe, "--recipe", "ft plan RECIPE")
    shared.quiet(bars=False)
    from finetune.early import planning

    checked = planning.recipe(reference, set_, gpu, json_)
    shared.quiet()
    shared.module("plan").run(checked, gpu=gpu, json_file=json_)


def compare(
    plain: shared.RecipeArgument = None,
    recipe: shared.RecipeOption = None,
    methods: Annotated[
        str, typer.Option(help="Adapter methods, separated by commas.", autocompletion=completion.methods)
    ] = "lora",
    quantization: Annotated[
        str, typer.Option(help="none, int8, int4, separated by commas.", autocompletion=completion.QUANTIZED)
    ] = "none",
    data_fractions: Annotated[str, typer.Option(help="Shares of the training rows, e.g. 0.125,0.25,0.5,1.")] = "1",
    set_: shared.Override = [],  # noqa: B006
    output: Annotated[str, typer.Option(help="Folder of the comparison.")] = "runs/compare",
    json_: groups.JsonOption = None,
) -> None:
    """Train methods on the same data and budget, and measure what each costs and brings."""
    from finetune.recipe.file import load
    from finetune.recipe.stages import SftRecipe
    from finetune.terminal.progress import command

    reference = shared.one_of(plain, recipe, "--recipe", "ft compare RECIPE --methods lora,bitfit")
    checked = load(reference, SftRecipe, set_, output)
    shared.quiet(bars=False)
    from finetune.commands import compare
    from finetune.commands.compare import plan
    from finetune.early import training
    from finetune.early.inputs import together

    names, kinds, shares = plan.parse(methods, quantization, data_fractions)
    try:
        place, fit = (lambda: plan.check_folder(Path(output), checked)), (lambda: plan.check_recipe(checked))
        together(place, fit, lambda: training.inputs(checked))
        shared.quiet()
        shared.warn_if(training.gpu_missing(reference, checked))
        compare.run(
            checked, methods=names, quantizations=kinds, fractions=shares, output=output, json_file=json_
        )  # fmt: skip
    except (KeyboardInterrupt, Interrupted):
        settings = {"--methods": methods, "--quantization": quantization, "--data-fractions": data_fractions}
        options = [part for pair in settings.items() for part in pair]
        options += [part for item in set_ for part in ("--set", item)] + (["--json", json_] if json_ else [])
        again = command("compare", "--recipe", reference, *options, "--output", output)
        raise Interrupted(f"stopped; what is done is kept; go on with {again}") from None


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Runs, or a folder of runs.", autocompletion=completion.runs_or_folders),
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = None,
) -> None:
    """A page of a run: curves, figures, samples, data. Of several runs one over another; of a folder an index."""
    shared.quiet(bars=False)
    from finetune.commands.report import run

    run(runs, output)


def doctor(json_: groups.JsonOption = None) -> None:
    """Versions, hardware, precision, and which extras are missing."""
    shared.quiet()
    from finetune.commands.doctor import run

    run(json_)


for _stage, _help in TRAINING.items():
    app.command(_stage, help=_help)(training_command(_stage))
OTHERS: dict[str, Callable[..., None]] = {
    "plan": plan, "merge": merging.merge, "export": merging.export, "eval": answering.evaluate,
    "generate": answering.generate, "compare": compare, "report": report, "chat": answering.chat,
    "serve": answering.serve, "doctor": doctor,
}  # fmt: skip
"""In the order of `ft --help`."""
for _name, _command in OTHERS.items():
    app.command(_name)(_command)
with_examples(app)
