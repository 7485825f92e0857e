"""What turns weights into other weights: `ft merge`, `ft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.cli import completion, shared
from finetune.errors import UserError


def merge(
    plain: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER[:WEIGHT]", help="As --adapter.", autocompletion=completion.runs_or_folders),
    ] = None,
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            metavar="ADAPTER[:WEIGHT]",
            help="Run directory or adapter folder; repeats.",
            autocompletion=completion.runs_or_folders,
        ),
    ] = [],  # noqa: B006
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the merged model.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, for adapters that do not name it.")] = None,
    combine: Annotated[
        str | None,
        typer.Option(
            help="Of several adapters: cat (the weighted sum, by default), svd, linear, ties or dare_ties.",
            autocompletion=completion.listed("cat", "svd", "linear", "ties", "dare_ties"),
        ),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of ties and dare_ties: share of entries kept; 0.5.")] = None,
    svd_rank: Annotated[
        int | None, typer.Option(help="Of svd: the rank that is kept; the largest of them.", min=1, max=shared.MOST)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare_ties draws; 0.", min=0, max=shared.SEEDS)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the base's own by default.")] = None,
    base: Annotated[str, typer.Option(help="For quantized runs: original or dequantized weights.")] = "original",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf; gguf: a file for llama.cpp and Ollama; chatglm: ChatGLM's original layout.",
            autocompletion=completion.listed("hf", "gguf", "chatglm"),
        ),
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
    from finetune.early import merging
    from finetune.models.pushing import Push

    push = Push(push_to_hub, hub, public, overwrite) if push_to_hub is not None else None
    shared.needs(push is not None, "--push-to-hub", **{"--hub": hub != "hub", "--public": public})
    how: dict[str, Any] = {"kind": combine, "density": density, "seed": seed, "svd_rank": svd_rank}
    merging.merged(
        adapters, Path(output).expanduser(), model, dtype, format_, overwrite, max_shard_size, push=push, base=base,
        **how,
    )  # fmt: skip
    shared.quiet()
    shared.module("merge").run(
        adapters, output, model=model, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, base=base,
        layout=format_, push=push, **how,
    )  # fmt: skip


def export(
    plain: Annotated[
        str | None,
        typer.Argument(metavar="ADAPTER", help="The same as --adapter.", autocompletion=completion.runs_or_folders),
    ] = None,
    adapter: shared.AdapterOption = None,
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME",
            help="Who is to load it: peft, vllm, llama.cpp or ollama.",
            autocompletion=completion.listed("peft", "vllm", "llama.cpp", "ollama"),
        ),
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
    from finetune.early import merging

    merging.exported(adapter, consumer, Path(output).expanduser(), model, overwrite)
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
    from finetune.early import merging

    merging.gguf(adapter, model, Path(output).expanduser(), kind, overwrite)
    shared.quiet()
    given = [word for name, value in options if value is not None for word in (name, value)]
    shared.module("gguf").run(adapter, output, model=model, kind=kind, overwrite=overwrite, options=given)
