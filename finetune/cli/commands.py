"""The commands. Each is a few lines; torch and the libraries are imported inside, so that help answers at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli import groups, shared
from finetune.errors import Interrupted, UserError

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
app.add_typer(groups.models_app, name="models")
app.add_typer(groups.recipes_app, name="recipes")
app.add_typer(groups.data_app, name="data")


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
    ) -> None:
        reference = shared.one_of(plain, recipe, "--recipe", f"ft {stage} RECIPE")
        shared.alone()
        shared.quiet(bars=False)
        from finetune import early

        checked: Recipe | None = None
        try:
            checked = early.recipe(reference, stage, set_, output, resume, overwrite, dry_run)
            shared.quiet()
            shared.warn_if(early.gpu_missing(reference, checked))
            shared.module(stage).run(checked, resume=resume, overwrite=overwrite, dry_run=dry_run)
        except KeyboardInterrupt:
            from finetune.run.resuming import to_start_again

            again = to_start_again(stage, reference, set_, output, resume, overwrite, dry_run, checked)
            raise Interrupted(f"interrupted before there was a checkpoint; start again with {again}") from None

    return command


for _stage, _help in TRAINING.items():
    app.command(_stage, help=_help)(training_command(_stage))


@app.command()
def merge(
    plain: Annotated[list[str] | None, typer.Argument(metavar="ADAPTER[:WEIGHT]", help="As --adapter.")] = None,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", metavar="ADAPTER[:WEIGHT]", help="Run directory or adapter folder; repeats."),
    ] = [],  # noqa: B006
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the merged model.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, for adapters that do not name it.")] = None,
    combine: Annotated[
        str | None,
        typer.Option(help="Of several adapters: cat (the weighted sum, by default), svd, linear, ties or dare_ties."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of ties and dare_ties: share of entries kept; 0.5.")] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="Of svd: the rank that is kept; the largest of them.", min=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare_ties draws; 0.", min=0)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's own by default.")] = None,
    base: Annotated[str, typer.Option(help="For quantized runs: original or dequantized weights.")] = "original",
    format_: Annotated[
        str,
        typer.Option("--format", help="hf; gguf: a file for llama.cpp and Ollama; chatglm: ChatGLM's original layout."),
    ] = "hf",
    gguf_type: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of --format gguf: f32, f16, bf16 or q8_0; as the weights are.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Push the result to a private repository.")
    ] = None,
    hub: Annotated[str, typer.Option(help="Where to: hub, or modelscope.")] = "hub",
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Merge an adapter, or several with weights, into its base and prove that the result computes the same."""
    usage = "ft merge ADAPTER --output FOLDER"
    adapters = [*(plain or []), *adapter]
    if format_ == "gguf":
        given = {
            "--push-to-hub": push_to_hub, "--hub": hub != "hub", "--public": public, "--combine": combine,
            "--density": density, "--seed": seed, "--svd-rank": svd_rank, "--max-shard-size": max_shard_size != "5GB",
        }  # fmt: skip
        for key in (key for key, value in given.items() if value not in (None, False)):
            raise UserError("has no effect on a GGUF file", key=key, fix="leave it out, or merge to a folder first")
        if len(adapters) > 1:
            raise UserError(
                "a GGUF file is made of one adapter", key="--adapter",
                fix="merge them to a folder, then ft merge --model FOLDER --format gguf",
            )  # fmt: skip
        options = [("--dtype", dtype), ("--base", base)]
        _gguf(adapters[0] if adapters else None, model, output, gguf_type, overwrite, options)
        return
    if gguf_type is not None:
        raise UserError("has no effect on other formats", key="--gguf-type", fix="add --format gguf, or leave it out")
    if not adapters:
        shared.one_of(None, None, "--adapter", usage)
    output = shared.one_of(None, output, "--output", usage)
    shared.quiet(bars=False)
    from finetune import early
    from finetune.hub import Push

    push = Push(push_to_hub, hub, public, overwrite) if push_to_hub is not None else None
    shared.needs(push is not None, "--push-to-hub", **{"--hub": hub != "hub", "--public": public})
    how: dict[str, Any] = {"kind": combine, "density": density, "seed": seed, "svd_rank": svd_rank}
    early.merged(
        adapters, Path(output).expanduser(), model, dtype, format_, overwrite, max_shard_size, push=push, **how
    )  # fmt: skip
    shared.quiet()
    shared.module("merge").run(
        adapters, output, model=model, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, base=base,
        layout=format_, push=push, **how,
    )  # fmt: skip


@app.command()
def export(
    plain: Annotated[str | None, typer.Argument(metavar="[ADAPTER]", help="The same as --adapter.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Run directory or adapter folder.")] = None,
    consumer: Annotated[
        str | None, typer.Option("--for", metavar="NAME", help="Who is to load it: peft, vllm, llama.cpp or ollama.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the exported adapter.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, for adapters that do not name it.")] = None,
    overwrite: shared.Overwrite = False,
) -> None:
    """Write an adapter as another program loads it, or name what keeps that program from it."""
    usage = "ft export ADAPTER --for vllm --output FOLDER"
    adapter = shared.one_of(plain, adapter, "--adapter", usage)
    consumer = shared.one_of(None, consumer, "--for", usage)
    output = shared.one_of(None, output, "--output", usage)
    shared.quiet(bars=False)
    from finetune import early

    early.exported(adapter, consumer, Path(output).expanduser(), model, overwrite)
    shared.quiet()
    shared.module("export").run(adapter, consumer, output, model=model, overwrite=overwrite)


def _gguf(
    adapter: str | None, model: str | None, output: str | None, kind: str | None, overwrite: bool,
    options: list[tuple[str, str | None]],
) -> None:  # fmt: skip
    """`ft merge --format gguf`; `options` are those of the merge that comes before it."""
    if not adapter and not model:
        raise UserError("no model to write", fix="write ft merge ADAPTER --format gguf --output NAME.gguf")
    output = shared.one_of(None, output, "--output", "ft merge ADAPTER --format gguf --output NAME.gguf")
    shared.quiet(bars=False)
    from finetune import early

    early.gguf(adapter, model, Path(output).expanduser(), kind, overwrite)
    shared.quiet()
    given = [word for name, value in options if value is not None for word in (name, value)]
    shared.module("gguf").run(adapter, output, model=model, kind=kind, overwrite=overwrite, options=given)


@app.command("eval")
def evaluate(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs, adapters or models.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="Evaluate this recipe's run.")] = None,
    model: shared.Model = None,
    adapter: shared.AdapterOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Held-out data; repeats. By default the run's eval.data, or what data.eval_split held out.",
        ),
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Base and tuned side by side.")] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="What is measured, separated by commas: names, file.py:function, and last regex:PATTERN."),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Examples with their answers before each row.", min=0)] = None,
    shots_from: Annotated[str | None, typer.Option(help="File of them; by default the run's training data.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="In place of --data: tasks of lm-evaluation-harness, or folders of some, with commas."),
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Kinds to compare: none,int8,int4.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first n rows.", min=1)] = None,
    temperature: shared.Temperature = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawn answers, and of shots.", min=0)] = None,
    reward: Annotated[str | None, typer.Option(help="Run of ft reward that scores the answers.")] = None,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Also as JSON; - is stdout.")] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Every row with its answer, as JSON lines.")
    ] = None,
    show: Annotated[int, typer.Option(metavar="N", help="Print so many wrong answers.", min=0)] = 3,
    show_changes: Annotated[
        int, typer.Option("--show-changes", metavar="N", help="So many rows that became wrong, and right.", min=0)
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation's answers.")] = False,
    thinking: shared.Thinking = None,
) -> None:
    """Held-out metrics: of answers exact match (also per value of a column `group`), per-field accuracy, loss and
    perplexity, or those of --metrics; of preference pairs accuracy and margins; of labelled answers and raw text their
    loss; of multiple choice (csv of C-Eval, CMMLU, MMLU) accuracy."""
    shared.quiet(bars=False)
    from finetune import early
    from finetune.recipe.sections import metric_names

    named = metric_names(metrics) if metrics else None
    early.evaluated(
        runs or [], recipe, model, adapter, data, reward, json_, quantization, predictions, named, thinking, shots_from,
        tasks,
    )  # fmt: skip
    shared.quiet()
    shared.module("evaluate").run(
        runs or [], recipe=recipe, model=model, adapter=adapter, data=data, compare_base=compare_base, limit=limit,
        json_file=json_, quantization=quantization, temperature=temperature, seed=seed, reward=reward,
        predictions=predictions, show=show, thinking=thinking, named=named, shots=shots,
        shots_from=shots_from, tasks=tasks, show_changes=show_changes,
        resume=resume,
    )  # fmt: skip


@app.command()
def generate(
    runs: Annotated[list[str] | None, typer.Argument(help="Runs, adapters or a model.")] = None,
    model: shared.Model = None,
    adapter: Annotated[
        list[str], typer.Option("--adapter", metavar="[NAME=]ADAPTER", help="Adapter of --model; repeats.")
    ] = [],  # noqa: B006
    data: Annotated[
        str | None, typer.Option("--data", help="JSON lines, JSON, csv, parquet, text; - is stdin.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|-", help="JSON lines; - is stdout. Goes on with its own."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to each row, drawn.", min=1)] = 1,
    temperature: shared.Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that hold so much.", max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 from all.", min=0)] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beam search.", min=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 against repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawn answers.", min=0)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer; the recipe's, or 256.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers at once; the recipe's, or 32.", min=1)] = None,
    system: Annotated[str | None, typer.Option(help="System turn of rows without one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue texts as they stand, without a chat template.")] = False,
    columns: Annotated[
        list[str], typer.Option("--columns", metavar="NAME=COLUMN", help="prompt=text: rename for reading; repeats.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Only the first n rows.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on with what is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew what ft generate wrote there.")] = False,
    thinking: shared.Thinking = None,
) -> None:
    """Answer the rows of a file or a pipe: each row whole, with its `prediction`, as JSON lines in the same order."""
    usage = "ft generate RUN --data FILE --output FILE"
    data = shared.one_of(None, data, "--data", usage)
    output = shared.one_of(None, output, "--output", usage)
    renamed = shared.pairs(columns, "--columns")
    shared.quiet(bars=False)
    from finetune import early

    settings = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "num_beams": num_beams,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    found, model, adapters = early.generated(
        runs or [], model, adapter, data, output, overwrite, resume, settings, n, system, raw, thinking
    )
    shared.quiet()
    shared.module("generate").run(
        found, data=data, output=output, model=model, adapters=adapters, options=settings, n=n, system=system, raw=raw,
        max_new_tokens=max_new_tokens, batch_size=batch_size, columns=renamed, limit=limit, resume=resume,
        overwrite=overwrite, thinking=thinking,
    )  # fmt: skip


@app.command()
def compare(
    plain: shared.RecipeArgument = None,
    recipe: shared.RecipeOption = None,
    methods: Annotated[str, typer.Option(help="Adapter methods, separated by commas.")] = "lora",
    quantization: Annotated[str, typer.Option(help="none, int8, int4, separated by commas.")] = "none",
    data_fractions: Annotated[str, typer.Option(help="Shares of the training rows, e.g. 0.125,0.25,0.5,1.")] = "1",
    set_: shared.Override = [],  # noqa: B006
    output: Annotated[str, typer.Option(help="Folder of the comparison.")] = "runs/compare",
) -> None:
    """Train methods on the same data and budget, and measure what each costs and brings."""
    from finetune.recipe.file import load
    from finetune.recipe.stages import SftRecipe
    from finetune.terminal.progress import command

    reference = shared.one_of(plain, recipe, "--recipe", "ft compare RECIPE --methods lora,bitfit")
    checked = load(reference, SftRecipe, set_, output)
    shared.quiet(bars=False)
    from finetune import early
    from finetune.commands import compare
    from finetune.commands.compare import plan

    names, kinds, shares = plan.parse(methods, quantization, data_fractions)
    try:
        place, fit = (lambda: plan.check_folder(Path(output), checked)), (lambda: plan.check_recipe(checked))
        early.together(place, fit, lambda: early.inputs(checked))
        shared.quiet()
        shared.warn_if(early.gpu_missing(reference, checked))
        compare.run(checked, methods=names, quantizations=kinds, fractions=shares, output=output)
    except (KeyboardInterrupt, Interrupted):
        settings = {"--methods": methods, "--quantization": quantization, "--data-fractions": data_fractions}
        options = [part for pair in settings.items() for part in pair]
        options += [part for item in set_ for part in ("--set", item)]
        again = command("compare", "--recipe", reference, *options, "--output", output)
        raise Interrupted(f"stopped; what is done is kept; go on with {again}") from None


@app.command()
def chat(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]...", help="What to talk to, known by its content."),
    ] = None,
    model: shared.Model = None,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", metavar="[NAME=]ADAPTER", help="Run or adapter; repeats, /adapter NAME switches."),
    ] = [],  # noqa: B006
    versus_base: Annotated[bool, typer.Option("--versus-base", help="The base answers beside it.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: shared.Temperature = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that hold so much.", max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens; 0 from all.", min=0)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 against repeating.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawn answers; another each time by default.", min=0)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    thinking: shared.Thinking = None,
    hide_thinking: Annotated[
        bool, typer.Option("--hide-thinking", help="Show answers without their thinking.")
    ] = False,
) -> None:
    """Talk to a model: in the terminal, or a message a line from a pipe. /help lists what else can be typed."""
    shared.quiet(bars=False)
    from finetune import early

    options = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "seed": seed,
    }  # fmt: skip
    listed, model, adapters = early.chat(runs or [], model, adapter, options, system, thinking)
    shared.quiet()
    shared.module("chat").run(
        listed, model=model, adapters=adapters, system=system, options=options, max_new_tokens=max_new_tokens,
        thinking=thinking, hide_thinking=hide_thinking, versus_base=versus_base,
    )  # fmt: skip


@app.command()
def serve(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]...", help="What answers, known by its content."),
    ] = None,
    model: shared.Model = None,
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", metavar="[NAME=]ADAPTER", help="Run or adapter, asked by its name; repeats."),
    ] = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is reachable from outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="FT_API_KEY", help="What clients must send as their key.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers written together.", min=1)] = 16,
    max_queue: Annotated[int, typer.Option(help="Answers that wait; more are told to come again.", min=1)] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt; the model's by default.", min=1)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 1024,
    max_body: Annotated[int, typer.Option(help="Largest request, in bytes.", min=1)] = 1 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.1)] = 600,
    thinking: shared.Thinking = None,
) -> None:
    """Answer over HTTP as OpenAI's API does; several adapters of one base by model name."""
    shared.quiet(bars=False)
    from finetune import early

    listed, model, adapters = early.served(runs or [], model, adapter, host, port, api_key, thinking, timeout)
    shared.quiet()
    shared.module("serve").run(
        listed, model=model, adapters=adapters, host=host, port=port, api_key=api_key, batch_size=batch_size,
        max_queue=max_queue, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, max_body=max_body,
        timeout=timeout, thinking=thinking,
    )  # fmt: skip


@app.command()
def doctor() -> None:
    """Versions, hardware, precision, and which extras are missing."""
    shared.quiet()
    from finetune.commands.doctor import run

    run()
