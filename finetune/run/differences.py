"""In what two runs differ: recipe, data, versions and machine, result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.recipe.stages import RECIPES
from finetune.run.records import Record, flat, is_number

UNSAID = ("output.dir",)  # differs between any two runs
FIGURES = (
    "status", "train_loss", "steps", "epochs", "seconds", "peak_memory_gb", "trainable_parameters", "total_parameters",
    "trained_tokens", "dropped_rows",
)  # fmt: skip


def recipe_values(record: Record) -> dict[str, Any]:
    return {key: value for key, value in flat(record.recipe).items() if key not in UNSAID}


def data_values(record: Record) -> dict[str, Any]:
    """Counts of the rows, and what was read by its content where a checkpoint knows it."""
    counts = record.result.get("data")
    return {**(counts if isinstance(counts, dict) else {}), **{f"content of {k}": v for k, v in record.inputs.items()}}


def version_values(record: Record) -> dict[str, Any]:
    found = record.result.get("versions")
    machine = record.result.get("machine")
    return {**(found if isinstance(found, dict) else {}), **flat(machine if isinstance(machine, dict) else {})}


def result_values(record: Record) -> dict[str, Any]:
    figures = {key: record.result[key] for key in FIGURES if record.result.get(key) is not None}
    if not record.result:
        figures = {"status": record.status, "steps": record.steps}
    held_out = record.held_out
    for name, value in held_out.items():
        if is_number(value):
            figures[f"held-out {name}"] = value
            if held_out.get(f"{name}_ci"):
                figures[f"held-out {name}"] = [float(end) for end in (value, *held_out[f"{name}_ci"])]
    return figures


HASH = 12
"""Characters of a content hash that are shown."""


def told(key: str, value: Any) -> Any:
    """A value as tables have it: of a content hash its beginning."""
    return value[:HASH] if key.startswith("content of ") and isinstance(value, str) else value


PARTS = {"recipe": recipe_values, "data": data_values, "versions": version_values, "result": result_values}


def differences(records: Sequence[Record]) -> dict[str, dict[str, list[Any]]]:
    """{part: {key: its value in each run}} of the keys that are not the same in all; None where a run has none."""
    found = {}
    for part, values_of in PARTS.items():
        each = [values_of(record) for record in records]
        keys = list(dict.fromkeys(key for values in each for key in values))
        table = {key: [values.get(key) for values in each] for key in keys}
        found[part] = {key: values for key, values in table.items() if any(v != values[0] for v in values[1:])}
    return found


def from_defaults(recipe: Mapping[str, Any]) -> dict[str, tuple[Any, Any, bool]]:
    """{dotted key: (value, the default, whether it is another)} of a resolved recipe; the default is None where a key
    has none or is always given."""
    usual = flat(defaults(str(recipe.get("stage")), str((recipe.get("adapter") or {}).get("method") or "")))
    return {
        key: (value, usual.get(key), key not in usual or usual[key] != value)
        for key, value in flat(recipe).items()
        if key not in ("version", "stage")
    }


def defaults(stage: str, method: str) -> dict[str, Any]:
    """Of every section of a stage, as `recipe.yaml` would have them."""
    from finetune.recipe.adapters import ADAPTERS
    from finetune.recipe.problems import models_in

    found: dict[str, Any] = {}
    kind = RECIPES.get(stage)
    for name, field in kind.model_fields.items() if kind is not None else ():
        classes = models_in(field.annotation)
        if name == "adapter":
            classes = [ADAPTERS[method]] if method in ADAPTERS else []
        if classes:
            found[name] = {}
            for key, one in classes[0].model_fields.items():
                if not one.is_required():
                    value = one.get_default(call_default_factory=True)
                    found[name][key] = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return found
