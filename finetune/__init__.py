"""ft: parameter-efficient fine-tuning of open language models from one YAML recipe.

Importing it makes the project's own adapters (BOTTLENECK, BITFIT, LAST_LAYERS) loadable with plain peft, whichever of
the two is imported first; it imports neither peft nor torch.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"


def _register() -> None:
    from finetune.adapters.tuners import bitfit, bottleneck, last_layers  # noqa: F401


class _WhenPeftIsImported(MetaPathFinder):
    """Registers the adapters right after peft's own import. Asked once, for peft alone, then out of the way."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WhenPeftIsImported())
