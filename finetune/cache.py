"""Where what was computed once is kept: tokenised rows, log-probabilities of a reference, converted models."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from finetune.terminal.progress import warn


@functools.cache
def cache_folder() -> Path:
    """Beside the cache of datasets, which the user may have moved; for this process only where that is read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = Path(os.environ.get("HF_HOME") or cache / "huggingface")
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser() / "finetune"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    warn(f"no cache can be kept in {folder}: set HF_DATASETS_CACHE to a folder that can be written to")
    scratch = tempfile.mkdtemp(prefix="ft-cache-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return Path(scratch)
