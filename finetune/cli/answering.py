"""What lets models answer: `ft eval`, `ft generate`, `ft chat`, `ft serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune.cli import completion, shared


def evaluate(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs, adapters or models.", autocompletion=completion.answering)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Evaluate this recipe's run.", autocompletion=completion.recipes),
    ] = None,
    model: shared.Model = None,
    adapter: shared.AdapterOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="Held-out data; repeats. By default the run's eval.data, or what data.eval_split held out.",
            autocompletion=completion.data,
        ),
    ] = None,
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Base and tuned side by side.")] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="What is measured, separated by commas: names, file.py:function, and last regex:PATTERN."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples with their answers before each row.", min=0, max=shared.MOST)
    ] = None,
    shots_from: Annotated[str | None, typer.Option(help="File of them; by default the run's training data.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="In place of --data: tasks of lm-evaluation-harness, or folders of some, with commas."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Kinds to compare: none,int8,int4.", autocompletion=completion.QUANTIZED)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first n rows.", min=1, max=shared.MOST)] = None,
    temperature: shared.Temperature = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the drawn answers, and of shots.", min=0, max=shared.SEEDS)
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="Run of ft reward that scores the answers.", autocompletion=completion.runs_or_folders),
    ] = None,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Also as JSON; - is stdout.")] = None,
    predictions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Every row with its answer, as JSON lines.")
    ] = None,
    show: Annotated[int, typer.Option(metavar="N", help="Print so many wrong answers.", min=0, max=shared.MOST)] = 3,
    show_changes: Annotated[
        int,
        typer.Option(
            "--show-changes", metavar="N", help="So many rows that became wrong, and right.", min=0, max=shared.MOST
        ),
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation's answers.")] = False,
    thinking: shared.Thinking = None,
) -> None:
    """Held-out metrics: of answers exact match (also per value of a column `group`), per-field accuracy, loss and
    perplexity, or those of --metrics; of preference pairs accuracy and margins; of labelled answers and raw text their
    loss; of multiple choice (csv of C-Eval, CMMLU, MMLU) accuracy."""
    shared.quiet(bars=False)
    from finetune.early import evaluating
    from finetune.recipe.sections import metric_names

    named = metric_names(metrics) if metrics else None
    evaluating.evaluated(
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


def generate(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs, adapters or a model.", autocompletion=completion.answering)
    ] = None,
    model: shared.Model = None,
    adapter: shared.Adapters = [],  # noqa: B006
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="JSON lines, JSON, csv, parquet, text; - is stdin.", autocompletion=completion.data
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE|-", help="JSON lines; - is stdout. Goes on with its own."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to each row, drawn.", min=1, max=shared.MOST)] = 1,
    temperature: shared.Temperature = None,
    top_p: shared.TopP = None,
    top_k: shared.TopK = None,
    num_beams: Annotated[int | None, typer.Option(help="Beam search.", min=1, max=shared.MOST)] = None,
    repetition_penalty: shared.RepetitionPenalty = None,
    seed: Annotated[int | None, typer.Option(help="Of the drawn answers.", min=0, max=shared.SEEDS)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; the recipe's, or 256.", min=1, max=shared.MOST)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Answers at once; the recipe's, or 32.", min=1, max=shared.MOST)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System turn of rows without one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue texts as they stand, without a chat template.")] = False,
    columns: Annotated[
        list[str], typer.Option("--columns", metavar="NAME=COLUMN", help="prompt=text: rename for reading; repeats.")
    ] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="Only the first n rows.", min=1, max=shared.MOST)] = None,
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
    from finetune.early import answering

    settings = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "num_beams": num_beams,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    found, model, adapters = answering.generated(
        runs or [], model, adapter, data, output, overwrite, resume, settings, n, system, raw, thinking
    )
    shared.quiet()
    shared.module("generate").run(
        found, data=data, output=output, model=model, adapters=adapters, options=settings, n=n, system=system, raw=raw,
        max_new_tokens=max_new_tokens, batch_size=batch_size, columns=renamed, limit=limit, resume=resume,
        overwrite=overwrite, thinking=thinking,
    )  # fmt: skip


def chat(
    runs: shared.Answering = None,
    model: shared.Model = None,
    adapter: shared.Adapters = [],  # noqa: B006
    versus_base: Annotated[bool, typer.Option("--versus-base", help="The base answers beside it.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: shared.Temperature = None,
    top_p: shared.TopP = None,
    top_k: shared.TopK = None,
    repetition_penalty: shared.RepetitionPenalty = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the drawn answers; another each time by default.", min=0, max=shared.SEEDS)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1, max=shared.MOST)] = 512,
    thinking: shared.Thinking = None,
    hide_thinking: Annotated[
        bool, typer.Option("--hide-thinking", help="Show answers without their thinking.")
    ] = False,
) -> None:
    """Talk to a model: in the terminal, or a message a line from a pipe. /help lists what else can be typed."""
    shared.quiet(bars=False)
    from finetune.early import answering

    options = {
        "temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty,
        "seed": seed,
    }  # fmt: skip
    listed, model, adapters = answering.chat(runs or [], model, adapter, options, system, thinking)
    shared.quiet()
    shared.module("chat").run(
        listed, model=model, adapters=adapters, system=system, options=options, max_new_tokens=max_new_tokens,
        thinking=thinking, hide_thinking=hide_thinking, versus_base=versus_base,
    )  # fmt: skip


def serve(
    runs: shared.Answering = None,
    model: shared.Model = None,
    adapter: shared.Adapters = [],  # noqa: B006
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is reachable from outside.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="FT_API_KEY", help="What clients must send as their key.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers written together.", min=1, max=shared.MOST)] = 16,
    max_queue: Annotated[
        int, typer.Option(help="Answers that wait; more are told to come again.", min=1, max=shared.MOST)
    ] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt; the model's by default.", min=1, max=shared.MOST)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1, max=shared.MOST)] = 1024,
    max_body: Annotated[int, typer.Option(help="Largest request, in bytes.", min=1, max=shared.MOST)] = 1 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.1)] = 600,
    thinking: shared.Thinking = None,
) -> None:
    """Answer over HTTP as OpenAI's API does; several adapters of one base by model name."""
    shared.quiet(bars=False)
    from finetune.early import answering

    listed, model, adapters = answering.served(runs or [], model, adapter, host, port, api_key, thinking, timeout)
    shared.quiet()
    shared.module("serve").run(
        listed, model=model, adapters=adapters, host=host, port=port, api_key=api_key, batch_size=batch_size,
        max_queue=max_queue, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens, max_body=max_body,
        timeout=timeout, thinking=thinking,
    )  # fmt: skip
