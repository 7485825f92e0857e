"""ft: parameter-efficient fine-tuning of open language models from one YAML recipe.

Importing it imports nothing else and changes nothing for others. `finetune.register()` makes the project's own
adapters (BITFIT, BOTTLENECK, LAST_LAYERS) known to peft, in whose hands they then load like any other.
"""

__version__ = "0.1.0"


def register() -> None:
    """Make the project's own PEFT types known to peft. Imports torch and peft; called again it does nothing."""
    from finetune.adapters.tuners import bitfit, bottleneck, last_layers  # noqa: F401
