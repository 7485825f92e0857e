"""`ft chat`: a conversation in the terminal, streamed; with piped input, one answer per line."""

from __future__ import annotations

import sys
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.evaluation import stop_ids
from finetune.families import family
from finetune.models import hardware, loading
from finetune.progress import note
from finetune.recipe import ModelConfig, compute_dtype

HELP = "/reset forgets the conversation, /exit leaves"


def run(model: str | None, adapter: str | None, system: str | None, temperature: float, max_new_tokens: int) -> None:
    folder = loading.adapter_folder(adapter) if adapter else None
    if model is None and folder is None:
        raise UserError("no model to talk to", fix="give --model, or --adapter RUN")
    config = ModelConfig(name=str(model)) if folder is None else loading.configs_of(folder, model)[1]
    if folder is not None:
        loading.check_adapter(folder, config)
    machine = hardware.detect()
    tokenizer = loading.load_tokenizer(config, folder)
    encoder = make_encoder(tokenizer, family(loading.read_config(config)["model_type"]))
    network = loading.load_model(config, getattr(torch, compute_dtype(config.dtype, machine)), machine)
    if folder is not None:
        network = loading.attach_adapter(network, folder, config)
    network.eval()
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
        except KeyboardInterrupt:
            print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            continue
        if line.startswith("/") and interactive and line in ("/help", "/?"):
            note(HELP)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        answer = reply(network, encoder, encoder.prompt_ids(messages, None), temperature, max_new_tokens)
        messages.append({"role": "assistant", "content": answer})


def reply(model: object, encoder: object, prompt: list[int], temperature: float, max_new_tokens: int) -> str:
    """Stream one answer to stdout; Ctrl-C ends the answer, not the conversation."""
    stop = StopFlag()
    streamer = TextIteratorStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[attr-defined]
    ids = torch.tensor([prompt], device=hardware.input_device(model))  # type: ignore[arg-type]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    thread = Thread(
        target=model.generate,  # type: ignore[attr-defined]
        kwargs={
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": max_new_tokens,
            "eos_token_id": stop_ids(model, encoder),  # type: ignore[arg-type]
            "pad_token_id": encoder.tokenizer.pad_token_id,  # type: ignore[attr-defined]
            "streamer": streamer,
            "stopping_criteria": [stop],
            **sampling,
        },
    )
    thread.start()
    parts = []
    try:
        for part in streamer:
            parts.append(part)
            print(part, end="", flush=True)
    except KeyboardInterrupt:
        stop.requested = True
    thread.join()
    print()
    return "".join(parts).strip()


class StopFlag:
    """A stopping criterion that another thread can raise."""

    requested = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested, device=input_ids.device, dtype=torch.bool)
