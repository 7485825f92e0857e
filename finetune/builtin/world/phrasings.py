"""How people write tickets: data_templates/world/phrasings.yaml, by language."""

from typing import Any

import yaml

from finetune.resources import resource_path

FIELDS = ("name", "order", "product", "city", "date", "amount")

# The loader in C: a few milliseconds instead of a hundred.
_TEXT = resource_path("data_templates", "world", "phrasings.yaml").read_text(encoding="utf-8")
_READ: dict[str, dict[str, Any]] = yaml.load(_TEXT, getattr(yaml, "CSafeLoader", yaml.SafeLoader))

CLAUSES: dict[str, dict[str, list[str]]] = _READ["clauses"]
PAIRS: dict[str, dict[tuple[str, str], list[str]]] = {
    language: {(a, b): texts for names, texts in pairs.items() for a, b in [names.split()]}
    for language, pairs in _READ["pairs"].items()
}
FULL: dict[str, list[str]] = _READ["full"]
CUES: dict[str, dict[str, list[str]]] = _READ["cues"]
LABELS: dict[str, dict[str, list[str]]] = _READ["labels"]
SMALL_TALK: dict[str, list[str]] = _READ["small_talk"]
FILLERS: dict[str, list[str]] = _READ["fillers"]
UNSEEN: dict[str, list[str]] = _READ["unseen"]
