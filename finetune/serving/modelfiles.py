"""What Ollama is told of a model's chat format: its template in Go's syntax, and what ends an answer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig

from finetune.data import templates
from finetune.data.encoder import Encoder
from finetune.data.types import RowProblem
from finetune.evaluation.generation import stop_ids
from finetune.models.gguf.modelfile import Modelfile, modelfile
from finetune.models.gguf.turns import Render
from finetune.terminal.progress import task


def ends(encoder: Encoder, folder: Path) -> list[int]:
    """Ids that end an answer of the model in `folder`."""
    own = None
    with suppress(OSError, ValueError):
        own = GenerationConfig.from_pretrained(str(folder))
    network: Any = SimpleNamespace(generation_config=own)  # all that `stop_ids` asks of one
    return stop_ids(network, encoder)


def of(encoder: Encoder, file: str, stops: list[int], begins: bool, **more: Any) -> Modelfile | None:
    """See `modelfile`. encoder: as the model is to be asked; begins: whether llama.cpp begins prompts with the first
    token by itself."""
    template = getattr(encoder, "template", None)
    tokens = [encoder.tokenizer.convert_ids_to_tokens(number) for number in stops]
    with task("writing the chat template for Ollama", after=1.0):
        return modelfile(
            file, renderer(encoder) if template else None, stops=tokens, template=template or "",
            bos=encoder.tokenizer.bos_token if begins else None, **more,
        )  # fmt: skip


def renderer(encoder: Any) -> Render:
    """Conversations as prompts of this model are written."""
    variables = encoder.told[encoder.asks]

    def render(messages: list[dict[str, Any]], prompt: bool, tools: Any = None) -> str | None:
        try:
            return templates.render(encoder.template, messages, tools, variables, prompt)
        except RowProblem:
            return None

    return render
