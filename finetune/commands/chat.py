"""`ft chat`: a conversation in the terminal, streamed; with piped input, one answer per line."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.errors import FinetuneError, RunError, UserError
from finetune.evaluation.generation import GREEDY, answer, not_followed, notice, stop_ids
from finetune.evaluation.options import overridden
from finetune.models import attach, hardware, sources
from finetune.models.identity import configs_of
from finetune.recipe.file import check
from finetune.recipe.resolve import compute_dtype
from finetune.recipe.sections import GenerationConfig, ModelConfig
from finetune.run.directory import read_recipe
from finetune.terminal.progress import note, say, warn

HELP = "/reset forgets the conversation, /exit leaves"


def run(
    *, model: str | None = None, adapter: str | None = None, system: str | None = None,
    temperature: float | None = None, max_new_tokens: int = 512,
) -> None:  # fmt: skip
    folder = sources.adapter_folder(adapter) if adapter else None
    config = ModelConfig(name=str(model)) if folder is None else configs_of(folder, model)[1]
    if folder is not None:
        attach.check_adapter(folder, config)
    machine, base = hardware.detect(), Base.open(config, folder)
    encoder = base.encoder
    network = base.load(getattr(torch, compute_dtype(config.dtype, machine)), machine).eval()
    how = settings_of(adapter or str(model), temperature)
    if how != GREEDY:
        note(f"answers: {how}")
    if (ignored := notice(not_followed(network))) is not None:
        note(ignored)
    interactive = sys.stdin.isatty()
    if interactive:
        note(HELP)

    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UserError("the input is not UTF-8 text", fix="save or send it as UTF-8") from None
        except KeyboardInterrupt:
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        if interactive and line in ("/help", "/?"):
            note(HELP)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            text = reply(network, encoder, encoder.prompt_ids(asked, None), how, max_new_tokens)
        except FinetuneError as error:  # the turn is forgotten: its message may be what went wrong
            if not interactive:
                raise
            warn("; ".join(error.lines()))
            continue
        messages = [*asked, {"role": "assistant", "content": text}]


def settings_of(reference: str, temperature: float | None) -> GenerationConfig:
    """How a run's recipe (eval.generation) and --temperature want answers; one at a time, and so without a seed."""
    path = Path(reference).expanduser()
    values = read_recipe(path)
    said = GREEDY if values is None else check(values, None, path / "recipe.yaml").eval.generation
    how = overridden(said, {"temperature": temperature})
    if how.num_beams > 1:
        note(f"eval.generation.num_beams {how.num_beams} is not followed: an answer is shown while it is written")
    return how.model_copy(update={"num_beams": 1})


def reply(model: Any, encoder: Encoder, prompt: list[int], how: GenerationConfig, max_new_tokens: int) -> str:
    """Stream one answer to stdout; Ctrl-C ends the answer, not the conversation. RunError when the model fails."""
    stop = StopFlag()
    streamer = TextIteratorStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([prompt], device=hardware.input_device(model))
    failed: list[BaseException] = []

    def write() -> None:
        try:
            answer(
                model, ids, torch.ones_like(ids), max_new_tokens, stop_ids(model, encoder),
                encoder.tokenizer.pad_token_id, how, streamer=streamer, stopping_criteria=[stop],
            )  # fmt: skip
        except BaseException as error:  # of a thread nobody would see it
            failed.append(error)
        finally:
            streamer.text_queue.put(streamer.stop_signal)  # whoever reads the stream would wait for ever

    thread = Thread(target=write)
    parts = []
    try:
        thread.start()
        for part in streamer:
            parts.append(part)
            say(part, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        stop.requested = True
        thread.join()
    print()
    if failed:
        reason = next(iter(str(failed[0]).splitlines()), "")
        advice = "a shorter conversation (/reset) or a smaller --max-new-tokens may help"
        raise RunError(f"the model could not go on: {type(failed[0]).__name__}: {reason}; {advice}") from failed[0]
    return "".join(parts).strip()


class StopFlag:
    """A stopping criterion that another thread can raise."""

    requested = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)
