"""docs/guards.md is true: the guards that it names are there, and so are the tests that hold them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    [cell.strip() for cell in line.strip("|\n ").split(" | ")]
    for line in (ROOT / "docs" / "guards.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| kind ", "|---"))
]


def defined(module: Path) -> set[str]:
    """Names of a module's functions, classes, their methods, and what it assigns."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def module_of(name: str) -> Path | None:
    """`run/guards` or `places` -> the file of that module; names of modules in packages stand alone, too."""
    exact = ROOT / "finetune" / f"{name}.py"
    if exact.is_file():
        return exact
    found = list((ROOT / "finetune").rglob(f"{name}.py")) + list((ROOT / "finetune").rglob(f"{name}/__init__.py"))
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_guards_and_tests_are_there(row: list[str]) -> None:
    _, guards, tests = row
    module: Path | None = None
    for name in re.findall(r"`([\w/.]+)`", guards):
        parts = name.split(".")
        if (named := module_of(parts[0])) is not None:
            module, parts = named, parts[1:]
        assert module is not None, f"{name}: no such module"
        missing = [part for part in parts if part not in defined(module)]
        assert not missing, f"{name}: {module.relative_to(ROOT)} has no {', '.join(missing)}"
    for test in re.findall(r"[\w/]*test_\w+\.py", tests):
        assert (ROOT / "tests" / test).is_file(), f"tests/{test} is not there"
