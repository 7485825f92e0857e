"""The commands of a group: `ft models …`, `ft recipes …`, `ft data …`, `ft runs …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.shared import MOST, Model, Override, RecipeOption, one_of, quiet

models_app = typer.Typer(help="Model families: what loads, how it was tested, what is refused.", no_args_is_help=True)
recipes_app = typer.Typer(help="Shipped recipes, new ones, and the schema for editors.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data before training on it.", no_args_is_help=True)
runs_app = typer.Typer(help="What was trained: a table, one run, two compared, one that goes on.", no_args_is_help=True)


@models_app.command("list")
def models_list(
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/models.md is made.")] = False,
) -> None:
    """Families, what was tested and how, and what never ran on real hardware."""
    from finetune.commands.models import show

    show(markdown=markdown)


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
    key: Annotated[str | None, typer.Argument(help="A key (data.packing), or a section (data).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them, as docs/recipe.md is made.")] = False,
) -> None:
    """What a recipe's key does: its values, its default, and where it applies."""
    from finetune.commands.recipes import explain

    explain(key, markdown=markdown)


Looked = Annotated[str | None, typer.Argument(metavar="[RECIPE|DATA]", help="The same as --recipe or --data.")]
DataOption = Annotated[str | None, typer.Option("--data", help="File, folder, glob, builtin:… or hub id.")]
StageOption = Annotated[str | None, typer.Option("--stage", help="The stage the data is for, without a recipe.")]
JsonOption = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="As JSON; - is stdout.")]


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


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]


@runs_app.command("list")
def runs_list(
    folder: Annotated[str, typer.Argument(help="Runs in it and below it.")] = "runs",
    stage: Annotated[str | None, typer.Option(help="Only of this stage.")] = None,
    base: Annotated[str | None, typer.Option(help="Only of bases whose name holds this.")] = None,
    method: Annotated[str | None, typer.Option(help="Only of this adapter method.")] = None,
    status: Annotated[str | None, typer.Option(help="running, interrupted, failed or done.")] = None,
    sort: Annotated[str, typer.Option(help="name, stage, base, method, metric, time, status or updated.")] = "name",
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
    first: Annotated[str, typer.Argument(metavar="A", help="Run directory.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
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
