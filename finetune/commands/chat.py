"""`ft chat`: a conversation in the terminal, streamed; with piped input, one answer per line."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer

from finetune.base import Base
from finetune.data import thinking as thoughts
from finetune.data.encoder import Encoder
from finetune.data.thinking import Thinking, switched
from finetune.errors import FinetuneError, RunError, UserError, visible
from finetune.evaluation.generation import GREEDY, answer, not_followed, notice, stop_ids
from finetune.evaluation.options import overridden
from finetune.models import attach, hardware, sources
from finetune.models.identity import configs_of
from finetune.recipe.file import check
from finetune.recipe.resolve import compute_dtype
from finetune.recipe.sections import GenerationConfig, ModelConfig
from finetune.run.directory import read_recipe
from finetune.terminal.progress import note, output, say, warn

HELP = "/reset forgets the conversation, /exit leaves"


def run(
    *, model: str | None = None, adapter: str | None = None, system: str | None = None,
    temperature: float | None = None, max_new_tokens: int = 512, thinking: str | None = None,
) -> None:  # fmt: skip
    folder = sources.adapter_folder(adapter) if adapter else None
    config = ModelConfig(name=str(model)) if folder is None else configs_of(folder, model)[1]
    if folder is not None:
        attach.check_adapter(folder, config)
    machine, base = hardware.detect(), Base.open(config, folder)
    encoder = base.asking(switched(thinking))
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
            turn = reply(network, encoder, encoder.prompt_ids(asked, None), how, max_new_tokens)
        except FinetuneError as error:  # the turn is forgotten: its message may be what went wrong
            if not interactive:
                raise
            warn("; ".join(error.lines()))
            continue
        messages = [*asked, turn]


def settings_of(reference: str, temperature: float | None) -> GenerationConfig:
    """How a run's recipe (eval.generation) and --temperature want answers; one at a time, and so without a seed."""
    path = Path(reference).expanduser()
    values = read_recipe(path)
    said = GREEDY if values is None else check(values, None, path / "recipe.yaml").eval.generation
    how = overridden(said, {"temperature": temperature})
    if how.num_beams > 1:
        note(f"eval.generation.num_beams {how.num_beams} is not followed: an answer is shown while it is written")
    return how.model_copy(update={"num_beams": 1})


def reply(
    model: Any, encoder: Encoder, prompt: list[int], how: GenerationConfig, max_new_tokens: int
) -> dict[str, Any]:
    """Stream one answer to stdout, its thinking dim; the turn that it is. Ctrl-C ends the answer, not the conversation.
    RunError when the model fails."""
    stop, stops = StopFlag(), stop_ids(model, encoder)
    begun = thoughts.begun(encoder.tokenizer, prompt, encoder.thinking)
    streamer = TextIteratorStreamer(Decoder(encoder, stops), skip_prompt=True)
    shown = Shown(encoder.thinking, begun)
    ids = torch.tensor([prompt], device=hardware.input_device(model))
    failed: list[BaseException] = []

    def write() -> None:
        try:
            answer(
                model, ids, torch.ones_like(ids), max_new_tokens, stops,
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
            shown.write(part)
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
    return turn_of("".join(parts).strip(), encoder, begun)


def turn_of(text: str, encoder: Encoder, begun: bool) -> dict[str, Any]:
    """An answer as the turn that it was: the template knows what becomes of its thinking later on."""
    found = thoughts.answer(text, encoder.thinking, begun)
    if not encoder.thinking.known or not (found.thought or found.unfinished):
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": found.text, "reasoning_content": found.thought}


class Decoder:
    """What a streamer asks a tokenizer for: text with the marks of thinking, and without what ends an answer."""

    def __init__(self, encoder: Encoder, stops: list[int]) -> None:
        self.encoder, self.stops = encoder, set(stops)

    def decode(self, ids: list[int], **_: Any) -> str:
        kept = [i for i in map(int, ids) if i not in self.stops]
        return thoughts.decoded(self.encoder.tokenizer, kept, self.encoder.thinking)


class Shown:
    """Writes an answer as it comes, thinking dim where the terminal has such letters."""

    def __init__(self, marks: Thinking, begun: bool) -> None:
        self.marks, self.thinks = marks, begun

    def write(self, part: str) -> None:
        while part:
            mark = self.marks.end if self.thinks else self.marks.begin
            before, found, part = part.partition(mark)
            if self.thinks:
                self._say(before + found, dim=True)
            else:
                self._say(before)
                self._say(found, dim=True)
            self.thinks = self.thinks != bool(found)

    def _say(self, text: str, dim: bool = False) -> None:
        if dim and text and output.is_terminal and not output.no_color:
            output.print(visible(text), style="dim", end="", soft_wrap=True)
            output.file.flush()
        elif text:
            say(text, end="", flush=True)


class StopFlag:
    """A stopping criterion that another thread can raise."""

    requested = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)
