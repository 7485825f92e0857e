"""The commands. Each is a few lines; torch and the libraries are imported inside, so that help answers at once."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import __version__
from finetune.child import PART
from finetune.errors import FinetuneError, Interrupted, UserError, explained, render, visible

if TYPE_CHECKING:
    from finetune.recipe.stages import Recipe

app = typer.Typer(
    name="ft",
    help="Fine-tune open language models from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="Model families: what loads, how it was tested, what is refused.", no_args_is_help=True)
app.add_typer(models_app, name="models")
recipes_app = typer.Typer(help="Shipped recipes, new ones, and the schema for editors.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="The same as --recipe.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", "-r", help="Recipe file, or a shipped recipe's name.")]
Override = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeats.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Run directory (instead of output.dir).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what ft wrote there, once the new is complete.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the complete recipe, write nothing.")]
Model = Annotated[str | None, typer.Option("--model", help="Built-in base, local folder or hub id.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="Run directory or adapter folder.")]

VERBOSE = False


def _quiet(bars: bool = True) -> None:
    """Before the first import of torch; without `bars` before what needs no transformers."""
    from finetune.terminal import noise

    if not VERBOSE:
        noise.silence()
        if bars:
            noise.silence_bars()


def _warn(message: str | None) -> None:
    from finetune.terminal.progress import warn

    if message is not None:
        warn(message)


def _module(name: str) -> ModuleType:
    """finetune.commands.NAME; importing the libraries takes seconds."""
    from finetune.terminal.progress import task

    with task("importing the libraries", after=1.0):
        return importlib.import_module(f"finetune.commands.{name}")


def _one_of(plain: str | None, option: str | None, name: str, usage: str) -> str:
    """What was given as a plain argument or as the option `name`. UserError for both and for neither."""
    if plain is not None and option is not None:
        raise UserError(f"given twice: {plain} and {name} {option}", fix="give one of them")
    given = option if plain is None else plain
    if not given:
        raise UserError(f"{name} is missing", fix=f"write {usage}")
    return given


RANKS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def alone() -> None:
    """UserError in one of several processes of a launcher: each would write into the same run directory."""
    for name in RANKS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise UserError(
                f"this is one of {count} processes, and ft trains in one, on one device", key=name,
                fix="start ft by itself, without torchrun, accelerate launch or mpirun",
            )  # fmt: skip


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


def _training_command(stage: str) -> Callable[..., None]:
    """`ft STAGE --recipe R`: check everything that needs no torch, then run finetune.commands.STAGE."""

    def command(
        plain: RecipeArgument = None,
        recipe: RecipeOption = None,
        set_: Override = [],  # noqa: B006 (typer copies it)
        output: Output = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
    ) -> None:
        reference = _one_of(plain, recipe, "--recipe", f"ft {stage} RECIPE")
        alone()
        _quiet(bars=False)
        from finetune import early

        checked: Recipe | None = None
        try:
            checked = early.recipe(reference, stage, set_, output, resume, overwrite, dry_run)
            _quiet()
            _warn(early.gpu_missing(reference, checked))
            _module(stage).run(checked, resume=resume, overwrite=overwrite, dry_run=dry_run)
        except KeyboardInterrupt:
            from finetune.run.resuming import to_start_again

            again = to_start_again(stage, reference, set_, output, resume, overwrite, dry_run, checked)
            raise Interrupted(f"interrupted before there was a checkpoint; start again with {again}") from None

    return command


for _stage, _help in TRAINING.items():
    app.command(_stage, help=_help)(_training_command(_stage))


@app.command()
def merge(
    plain: Annotated[str | None, typer.Argument(metavar="[ADAPTER]", help="The same as --adapter.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Run directory or adapter folder.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the merged model.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, for adapters that do not name it.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's own by default.")] = None,
    base: Annotated[str, typer.Option(help="For quantized runs: original or dequantized weights.")] = "original",
    format_: Annotated[
        str, typer.Option("--format", help="hf, or chatglm: ChatGLM's original layout, for the published code.")
    ] = "hf",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its base and prove that the result computes the same."""
    usage = "ft merge ADAPTER --output FOLDER"
    adapter = _one_of(plain, adapter, "--adapter", usage)
    output = _one_of(None, output, "--output", usage)
    _quiet(bars=False)
    from finetune import early

    early.merged(adapter, Path(output).expanduser(), model, dtype, format_, overwrite)
    _quiet()
    _module("merge").run(adapter, output, model, dtype, max_shard_size, overwrite, base, format_)


@app.command("eval")
def evaluate(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs, adapters or models.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Evaluate this recipe's run.")] = None,
    model: Model = None,
    adapter: AdapterOption = None,
    data: Annotated[
        str | None,
        typer.Option(help="Held-out data; by default the run's eval.data, or what data.eval_split held out."),
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Base and tuned side by side.")] = False,
    quantization: Annotated[str | None, typer.Option(help="Kinds to compare: none,int8,int4.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first n rows.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 answers greedily, above it answers are drawn.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the drawn answers.")] = 0,
    reward: Annotated[str | None, typer.Option(help="Run of ft reward that scores the answers.")] = None,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Also as JSON; - is stdout.")] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Every row with its answer, as JSON lines.")
    ] = None,
    show: Annotated[int, typer.Option(metavar="N", help="Print so many wrong answers.", min=0)] = 3,
) -> None:
    """Held-out metrics: of answers exact match (also per value of a column `group`), per-field accuracy, loss and
    perplexity; of preference pairs accuracy and margins; of labelled answers and raw text their loss."""
    _quiet(bars=False)
    from finetune import early

    early.evaluated(runs or [], recipe, model, adapter, data, reward, json_, quantization, predictions)
    _quiet()
    _module("evaluate").run(
        runs or [], recipe=recipe, model=model, adapter=adapter, data=data, compare_base=compare_base, limit=limit,
        json_file=json_, quantization=quantization, temperature=temperature, seed=seed, reward=reward,
        predictions=predictions, show=show,
    )  # fmt: skip


@app.command()
def compare(
    plain: RecipeArgument = None,
    recipe: RecipeOption = None,
    methods: Annotated[str, typer.Option(help="Adapter methods, separated by commas.")] = "lora",
    quantization: Annotated[str, typer.Option(help="none, int8, int4, separated by commas.")] = "none",
    data_fractions: Annotated[str, typer.Option(help="Shares of the training rows, e.g. 0.125,0.25,0.5,1.")] = "1",
    set_: Override = [],  # noqa: B006
    output: Annotated[str, typer.Option(help="Folder of the comparison.")] = "runs/compare",
) -> None:
    """Train methods on the same data and budget, and measure what each costs and brings."""
    from finetune.recipe.file import load
    from finetune.recipe.stages import SftRecipe
    from finetune.terminal.progress import command

    reference = _one_of(plain, recipe, "--recipe", "ft compare RECIPE --methods lora,bitfit")
    checked = load(reference, SftRecipe, set_, output)
    _quiet(bars=False)
    from finetune import early
    from finetune.commands.compare import check_folder, check_recipe, parse, run

    wanted = parse(methods, quantization, data_fractions)
    try:
        place, fit = (lambda: check_folder(Path(output), checked)), (lambda: check_recipe(checked))
        early.together(place, fit, lambda: early.inputs(checked))
        _quiet()
        _warn(early.gpu_missing(reference, checked))
        run(checked, *wanted, output)
    except (KeyboardInterrupt, Interrupted):
        settings = {"--methods": methods, "--quantization": quantization, "--data-fractions": data_fractions}
        options = [part for pair in settings.items() for part in pair]
        options += [part for item in set_ for part in ("--set", item)]
        again = command("compare", "--recipe", reference, *options, "--output", output)
        raise Interrupted(f"stopped; what is done is kept; go on with {again}") from None


@app.command()
def chat(
    plain: Annotated[
        str | None, typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="What to talk to, known by its content.")
    ] = None,
    model: Model = None,
    adapter: AdapterOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.", min=0.0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
) -> None:
    """Talk to a model; /reset forgets the conversation, /exit leaves."""
    _quiet(bars=False)
    from finetune import early

    model, adapter = early.chat(plain, model, adapter)
    _quiet()
    _module("chat").run(model, adapter, system, temperature, max_new_tokens)


@app.command()
def doctor() -> None:
    """Versions, hardware, precision, and which extras are missing."""
    _quiet()
    from finetune.commands.doctor import run

    run()


@models_app.command("list")
def models_list(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/models.md is made.")] = False,
) -> None:
    """Families, what was tested and how, and what never ran on real hardware."""
    from finetune.commands.models import show

    show(markdown)


@recipes_app.command("list")
def recipes_list() -> None:
    """Shipped recipes, with what each needs."""
    from finetune.commands.recipes import show_all

    show_all()


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    from finetune.commands.recipes import show

    show(name)


@recipes_app.command("new")
def recipes_new(
    path: Annotated[str, typer.Argument(help="File to write.")],
    stage: Annotated[str | None, typer.Option(help="pretrain, sft, reward, dpo, kto, ppo; the rows tell it.")] = None,
    model: Annotated[str, typer.Option(help="The base model.")] = "tiny-llama",
    data: Annotated[str, typer.Option(help="Training data.")] = "data/train.jsonl",
) -> None:
    """Write a recipe to start from."""
    from finetune.commands.recipes import new

    new(path, stage, model, data)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes."""
    from finetune.commands.recipes import show_schema

    show_schema()


@recipes_app.command("explain")
def recipes_explain(
    key: Annotated[str | None, typer.Argument(help="A key (data.packing), or a section (data).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them, as docs/recipe.md is made.")] = False,
) -> None:
    """What a recipe's key does: its values, its default, and where it applies."""
    from finetune.commands.recipes import explain

    explain(key, markdown)


Looked = Annotated[str | None, typer.Argument(metavar="[RECIPE|DATA]", help="The same as --recipe or --data.")]
DataOption = Annotated[str | None, typer.Option("--data", help="File, folder, glob, builtin:… or hub id.")]
StageOption = Annotated[str | None, typer.Option("--stage", help="The stage the data is for, without a recipe.")]
JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="As JSON; - is stdout.")]


def _recipe_or_data(plain: str | None, recipe: str | None, data: str | None) -> tuple[str | None, str | None]:
    """(--recipe, --data): a plain argument is a recipe when it is a .yaml file or a shipped recipe's name."""
    if plain is None:
        return recipe, data
    from finetune.recipe.reading import shipped

    named = plain.lower().endswith((".yaml", ".yml")) or (f"{plain}.yaml" in shipped() and not Path(plain).exists())
    name, option = ("--recipe", recipe) if named else ("--data", data)
    given = _one_of(plain, option, name, "")
    return (given, data) if named else (recipe, given)


@data_app.command("check")
def data_check(
    plain: Looked = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    model: Model = None,
    stage: StageOption = None,
    eval_data: Annotated[str | None, typer.Option("--eval", help="Held-out data, to look for leakage.")] = None,
    set_: Override = [],  # noqa: B006 (typer copies it)
    fix: Annotated[str | None, typer.Option(metavar="OUT", help="Write the clean rows; rejects beside them.")] = None,
    json_: JsonOption = None,
) -> None:
    """Find everything that is wrong with the data, row by row."""
    recipe, data = _recipe_or_data(plain, recipe, data)
    _quiet(bars=False)
    from finetune.commands.data import check

    code = check(
        recipe=recipe, overrides=set_, data=data, model=model, stage=stage, eval_data=eval_data, fix=fix,
        json_file=json_,
    )  # fmt: skip
    raise typer.Exit(code)


@data_app.command("preview")
def data_preview(
    plain: Looked = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    model: Model = None,
    stage: StageOption = None,
    limit: Annotated[int, typer.Option(help="How many rows.", min=1)] = 5,
    set_: Override = [],  # noqa: B006 (typer copies it)
    json_: JsonOption = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="As a page for the browser.")] = None,
) -> None:
    """Show samples as the model sees them, trained tokens coloured."""
    recipe, data = _recipe_or_data(plain, recipe, data)
    _quiet(bars=False)
    from finetune.commands.data import preview

    preview(
        recipe=recipe, overrides=set_, data=data, model=model, stage=stage, limit=limit, json_file=json_,
        html_file=html,
    )  # fmt: skip


OTHER_COMMANDS = {
    "train": "ft sft, ft pretrain, ft reward, ft dpo, ft kto or ft ppo",
    "finetune": "ft sft, ft pretrain, ft reward, ft dpo, ft kto or ft ppo",
    "rlhf": "ft dpo, ft kto, ft reward or ft ppo",
    "rm": "ft reward",
    "export": "ft merge",
    "evaluate": "ft eval",
    "infer": "ft chat, or ft eval for a file",
    "inference": "ft chat, or ft eval for a file",
    "predict": "ft eval",
    "preprocess": "ft data check, or ft data preview",
    "env": "ft doctor",
    "version": "ft --version",
}
"""What other tools call it -> the command here."""


def main() -> None:
    """Entry point: one renderer for errors, the exit codes of the contract."""
    global VERBOSE
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", "--verbose")]
    part = arguments[:1] == [PART]
    if part:
        from finetune.terminal import progress

        progress.advising, arguments = False, arguments[1:]
    VERBOSE, debug = "--verbose" in sys.argv, "--debug" in sys.argv
    if arguments == ["--version"]:
        print(f"ft {__version__}")
        return
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    from finetune.terminal.progress import settle_streams

    settle_streams()
    try:
        if arguments and arguments[0] in OTHER_COMMANDS:
            raise UserError(f"no command {arguments[0]!r}", fix=OTHER_COMMANDS[arguments[0]])
        code = app(args=arguments, prog_name="ft", standalone_mode=False) or 0
        if code == 130:  # typer makes this of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()  # or a full disk is told too late for a line and an exit code of its own
        sys.exit(code)
    except FinetuneError as error:
        if debug:
            raise
        if not (part and error.exit_code == 130):
            _print_errors(render(error), "yellow" if error.exit_code == 130 else "red")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # typer takes every EOFError for Ctrl-D
            if debug:
                raise
            _print_bug(error.__cause__)
            sys.exit(1)
        from finetune.terminal.progress import command

        if not part:
            _print_errors([f"interrupted; start again with {command(*arguments)}"], "yellow")
        sys.exit(130)
    except BrokenPipeError:
        _close_stdout()
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong arguments, in typer's own words
            said = io.StringIO()
            error.show(file=said)
            print(visible(said.getvalue()), end="", file=sys.stderr)
            sys.exit(error.exit_code)
        if debug:
            raise
        if (known := explained(error)) is not None:
            _print_errors(render(known), "red")
            _close_stdout()
            sys.exit(known.exit_code)
        _print_bug(error)
        sys.exit(1)


def _print_bug(error: BaseException) -> None:
    _print_errors([f"{type(error).__name__}: {error}", "this is a bug; --debug shows the traceback"], "red")


def _print_errors(lines: list[str], style: str) -> None:
    from finetune.terminal.progress import note

    for line in lines:
        note(line, style)


def _close_stdout() -> None:
    """What is left to print has nowhere to go: without this Python tries again at its end, and complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
