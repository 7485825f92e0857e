"""Files that come with the package: recipes, sample data, chat templates and the built-in bases."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
BUILTIN_MODELS = PACKAGE / "builtin" / "bases"


def resource_path(*parts: str) -> Path:
    """Path of shipped data (`recipes/…`, `data_templates/…`): in the package of a wheel, beside it in a checkout."""
    inside = PACKAGE.joinpath(*parts)
    return inside if inside.exists() else PACKAGE.parent.joinpath(*parts)
