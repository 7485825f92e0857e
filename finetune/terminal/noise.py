"""Keep the libraries' progress bars, warnings and notices off the screen. Call before they are imported."""

from __future__ import annotations

import logging
import os
import warnings

LIBRARIES = (
    "trl", "peft", "accelerate", "datasets", "torch", "bitsandbytes", "huggingface_hub", "transformers", "matplotlib",
)  # fmt: skip


def silence() -> None:
    warnings.simplefilter("ignore")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    # bitsandbytes reports as an error that an optional CPU kernel is not installed; it then uses its own.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    # These libraries read their settings from the environment only.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl reports usage otherwise
    os.environ.setdefault("TQDM_DISABLE", "1")  # trl's reference pass
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def silence_bars() -> None:
    """transformers has no variable for its bars; after the import."""
    import transformers

    transformers.logging.disable_progress_bar()
