"""The commands of a group: `ft models …`, `ft recipes …`, `ft data …`, `ft runs …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli import completion
from finetune.cli.shared import MOST, Model, Override, RecipeOption, one_of, quiet
from finetune.errors import UserError

models_app = typer.Typer(help="Model families: what loads, how it was tested, what is refused.", no_args_is_help=True)
recipes_app = typer.Typer(help="Shipped recipes, new ones, and the schema for editors.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
runs_app = typer.Typer(help="What was trained: a table, one run, two compared, one that goes on.", no_args_is_help=True)
JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="As JSON; - is stdout.")]


def one_form(markdown: bool, json_file: str | None) -> None:
    """UserError for both."""
    if markdown and json_file is not None:
        raise UserError("given with --json", key="--markdown", fix="give one of them")


STAGE_NAMES = completion.listed(*completion.STAGES)


@models_app.command("list")
def models_list(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/models.md is made.")] = False,
    json_: JsonOption = None,
) -> None:
    """Families, what was tested and how, and what never ran on real hardware."""
    from finetune.commands.models import show

    one_form(markdown, json_)
    show(markdown=markdown, json_file=json_)


@recipes_app.command("list")
def recipes_list(json_: JsonOption = None) -> None:
    """Shipped recipes, with what each needs."""
    from finetune.commands.recipes import show_all

    show_all(json_)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(autocompletion=completion.shipped_names)]) -> None:
    """Print a shipped recipe."""
    from finetune.commands.recipes import show

    show(name)


@recipes_app.command("new")
def recipes_new(
    path: Annotated[str, typer.Argument(help="File to write.")],
    stage: Annotated[
        str | None,
        typer.Option(help="pretrain, sft, reward, dpo, kto, ppo; the rows tell it.", autocompletion=STAGE_NAMES),
    ] = None,
    model: Annotated[str, typer.Option(help="The base model.", autocompletion=completion.bases)] = "tiny-llama",
    data: Annotated[str, typer.Option(help="Training data.", autocompletion=completion.data)] = "data/train.jsonl",
) -> None:
    """Write a recipe to start from."""
    from finetune.commands.recipes import new

    new(path, stage=stage, model=model, data=data)


@recipes_app.command("import")
def recipes_import(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Their YAML, JSON or shell script.")],
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="RECIPE", help="A new file.")] = None,
) -> None:
    """A config or command line of LLaMA-Factory, axolotl, ms-swift or trl as a recipe; says what has no equivalent."""
    from finetune.commands.recipes import import_file

    import_file(file, output)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes."""
    from finetune.commands.recipes import show_schema

    show_schema()


@recipes_app.command("explain")
def recipes_explain(
    key: Annotated[
        str | None,
        typer.Argument(help="A key (data.packing), or a section (data).", autocompletion=completion.key_names),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them, as docs/recipe.md is made.")] = False,
    json_: JsonOption = None,
) -> None:
    """What a recipe's key does: its values, its default, and where it applies."""
    from finetune.commands.recipes import explain

    one_form(markdown, json_)
    explain(key, markdown=markdown, json_file=json_)


Looked = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE|DATA", help="The same as --recipe or --data.", autocompletion=completion.recipes_or_data
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="File, folder, glob, builtin:… or hub id.", autocompletion=completion.data),
]
StageOption = Annotated[
    str | None,
    typer.Option("--stage", help="The stage the data is for, without a recipe.", autocompletion=STAGE_NAMES),
]


def recipe_or_data(plain: str | None, recipe: str | None, data: str | None) -> tuple[str | None, str | None]:
    """(--recipe, --data): a plain argument is a recipe when it is a .yaml file or a shipped recipe's name."""
    if plain is None:
        return recipe, data
    from finetune.recipe.reading import shipped

    named = plain.lower().endswith((".yaml", ".yml")) or (f"{plain}.yaml" in shipped() and not Path(plain).exists())
    name, option = ("--recipe", recipe) if named else ("--data", data)
    given = one_of(plain, option, name, "")
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
    recipe, data = recipe_or_data(plain, recipe, data)
    quiet(bars=False)
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
    limit: Annotated[int, typer.Option(help="How many rows.", min=1, max=MOST)] = 5,
    set_: Override = [],  # noqa: B006 (typer copies it)
    json_: JsonOption = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="As a page for the browser.")] = None,
) -> None:
    """Show samples as the model sees them, trained tokens coloured."""
    recipe, data = recipe_or_data(plain, recipe, data)
    quiet(bars=False)
    from finetune.commands.data import preview

    preview(
        recipe=recipe, overrides=set_, data=data, model=model, stage=stage, limit=limit, json_file=json_, html_file=html
    )


RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run directory.", autocompletion=completion.runs_or_folders)
]
SORTS = completion.listed("name", "stage", "base", "method", "metric", "time", "status", "updated")
STATUSES = completion.listed("running", "interrupted", "failed", "done")


@runs_app.command("list")
def runs_list(
    folder: Annotated[
        str, typer.Argument(help="Runs in it and below it.", autocompletion=completion.runs_or_folders)
    ] = "runs",
    stage: Annotated[str | None, typer.Option(help="Only of this stage.", autocompletion=STAGE_NAMES)] = None,
    base: Annotated[str | None, typer.Option(help="Only of bases whose name holds this.")] = None,
    method: Annotated[str | None, typer.Option(help="Only of this adapter method.")] = None,
    status: Annotated[
        str | None, typer.Option(help="running, interrupted, failed or done.", autocompletion=STATUSES)
    ] = None,
    sort: Annotated[
        str, typer.Option(help="name, stage, base, method, metric, time, status or updated.", autocompletion=SORTS)
    ] = "name",
    reverse: Annotated[bool, typer.Option("--reverse", help="Largest, longest or newest first.")] = False,
    json_: JsonOption = None,
) -> None:
    """A table of the runs below a folder: what was trained, how well, how far it is."""
    quiet(bars=False)
    from finetune.commands import records

    records.show_list(
        folder, stage=stage, base=base, method=method, status=status, sort=sort, reverse=reverse, json_file=json_
    )


@runs_app.command("show")
def runs_show(run: RunArgument, json_: JsonOption = None) -> None:
    """One run: its figures, what was decided, and its recipe where it is not the default."""
    quiet(bars=False)
    from finetune.commands import records

    records.show(run, json_)


@runs_app.command("diff")
def runs_diff(
    first: Annotated[
        str, typer.Argument(metavar="A", help="Run directory.", autocompletion=completion.runs_or_folders)
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.", autocompletion=completion.runs_or_folders)],
    json_: JsonOption = None,
) -> None:
    """What differs between two runs: recipe, data, versions, result."""
    quiet(bars=False)
    from finetune.commands import records

    records.diff(first, second, json_)


@runs_app.command("watch")
def runs_watch(
    run: RunArgument,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
) -> None:
    """The curve and the last samples of a run that goes on, in the terminal; ends with the run."""
    quiet(bars=False)
    from finetune.commands.records.watch import watch

    try:
        watch(run, interval)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None  # the run goes on, only the look at it ends
