"""`ft serve`: a model, or several adapters on one base, behind OpenAI's HTTP API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.errors import UserError
from finetune.evaluation.answering import Writer, tell_formats
from finetune.evaluation.targets import Target, bases_of
from finetune.evaluation.writers import changes_base, load, share, targets_of, writer_of
from finetune.serving import address
from finetune.serving.app import Bounds, make_app, place_of
from finetune.serving.asking import Served
from finetune.serving.engine import Engine
from finetune.serving.server import Server
from finetune.terminal.progress import note, warn


def run(
    runs: Sequence[str] = (), *, model: str | None = None, adapters: dict[str, str] | None = None,
    host: str = address.LOOPBACK, port: int = 8000, api_key: str | None = None, thinking: str | None = None,
    batch_size: int = 16, max_queue: int = 64, max_prompt_tokens: int | None = None, max_new_tokens: int = 1024,
    max_body: int = 1 << 20, timeout: float = 600,
) -> None:  # fmt: skip
    """
    Args:
        adapters: by name. max_queue: answers that wait. max_body: bytes. timeout: seconds for a request.
    """
    listener = address.bound(host, port)
    writers = made(targets_of(runs, model, adapters or {}), thinking)
    loaded = [writer for writer in writers.values() if not is_bare(writer, writers)]
    tell_formats(writers.values())
    load(loaded)
    for writer in writers.values():
        if writer.network is None:
            share(loaded[0], writer)
    bounds = {"longest_prompt": max_prompt_tokens, "longest_answer": max_new_tokens, "most_rows": max_queue}
    served = {
        name: Served.of(name, writer, writer.target.eval.generation, **bounds) for name, writer in writers.items()
    }
    for one in served.values():
        if one.how.num_beams > 1:
            note(f"{one.name}: eval.generation.num_beams {one.how.num_beams} is not followed: answers are streamed")
    engine = Engine(writers, batch_size, max_queue)
    engine.failure = lambda error: note(f"a batch failed: {place_of(error)}", "red")
    server = Server(make_app(served, engine, Bounds(timeout, max_body), api_key), engine)
    if not address.is_loopback(listener):
        who = "whoever has the key" if api_key is not None else "whoever reaches it, without a key"
        warn(f"{host} is reachable from other machines: {who} may ask; what is sent is not encrypted")
    address.listen(listener, host, port)
    note(f"serving {', '.join(served)} at {address.url(listener)}/v1")
    server.serve_on(listener)


def made(targets: Sequence[Target], thinking: str | None) -> dict[str, Writer]:
    """Who answers, by name, not yet loaded: the adapters, and their base where they can be switched off."""
    first = targets[0]
    found = {name_of(target): writer_of(target, thinking=thinking) for target in targets}
    if first.adapter is None:
        return found
    if changes_base(first):
        note("the base is not served: the adapter has embeddings or a start of its own")
        return found
    base = bases_of([first], "--model")[0]
    name = name_of(replace(base, name=base.model.name))
    if name in found:
        what = f"an adapter is called {name}, as its base is"
        raise UserError(what, key="--adapter", fix="give it another name: --adapter NAME=PATH")
    return {**found, name: writer_of(base, thinking=thinking)}


def is_bare(writer: Writer, writers: dict[str, Writer]) -> bool:
    """Whether it is the base of adapters that are served beside it."""
    return writer.target.adapter is None and len(writers) > 1


def name_of(target: Target) -> str:
    """What clients call it: a name or hub id as it is, of a path its last part."""
    place = target.model.name
    if target.adapter is not None or target.trained or target.name != place:
        return target.name
    return place.rstrip("/").rpartition("/")[2] if place.startswith((".", "/", "~")) else place
