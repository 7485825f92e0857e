"""What libraries raise while a model, a tokenizer or an adapter is loaded, as one line for the user."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from finetune import hub
from finetune.errors import FinetuneError, UserError
from finetune.models import sources
from finetune.recipe.sections import ModelConfig


@contextmanager
def as_user_error(model: ModelConfig) -> Iterator[None]:
    """What transformers says about a checkpoint it cannot load, in one line."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(
            "a .bin file holds more than weights: pickled code is never run", path=model.name, key="model.name",
            fix="save it again as safetensors where it comes from",
        ) from None  # fmt: skip
    except torch.OutOfMemoryError:
        raise UserError(
            "does not fit into the device's memory", path=model.name, key="model.name",
            fix="set model.quantization: int4, or model.device_map: auto (which can generate, not train)",
        ) from None  # fmt: skip
    except FinetuneError:
        raise
    except Exception as error:  # a config.json with odd values ends in any kind of error
        what, fix = unloadable(error, model, f"cannot be loaded ({reason(error)})")
        raise UserError(what, path=model.name, key="model.name", fix=fix) from error


def unloadable(error: Exception, model: ModelConfig, otherwise: str) -> tuple[str, str]:
    """(message, fix): of the hub, where files could not be had from there, else `otherwise`."""
    if hub.failed(error) and not Path(sources.weights(model)).is_dir():
        return hub.why(error)
    return otherwise, sources.HUB_HELP


def reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}"
