"""Imports point one way: cli -> commands -> rl -> evaluation -> training -> adapters -> data, models -> … -> errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "finetune"

# A module may import from lower levels; within a level only from its own package.
LEVELS = [
    {"language"},
    {"errors", "json_text", "resources"},
    {"families", "given_files", "python_files", "ranks"},
    {"recipe"},
    {"child", "metrics", "places", "terminal", "hub", "builtin"},
    {"run", "cache"},
    {"data", "models", "report"},
    {"base"},
    {"adapters"},
    {"planning"},
    {"training"},
    {"evaluation"},
    {"rl", "serving"},
    {"early"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


OWN = ("__version__", "register")  # the package's own: it imports what it needs when it is called


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[tuple[str, ...]]:
    """The finetune modules a file imports anywhere, as tuples of names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "finetune":
            below = tuple(node.module.split(".")[1:])
            found |= {below} if below else {(alias.name,) for alias in node.names if alias.name not in OWN}
        elif isinstance(node, ast.Import):
            found |= {tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "finetune"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    for target in imports(path):
        if target[0] == own:
            assert own != "commands" or target[1:2] == path.relative_to(PACKAGE).with_suffix("").parts[1:2], (
                f"{path.name} imports another command: {target}"
            )
        else:
            assert LEVEL[target[0]] < LEVEL[own], f"{own} must not import {'.'.join(target)}"


TORCH_FREE = ["finetune.cli", "finetune.recipe", "finetune.recipe.file", "finetune.families", "finetune.errors",
              "finetune.run.opening",
              "finetune.metrics", "finetune.data.sources", "finetune.data.formats", "finetune.hub",
              "finetune.models.sources", "finetune.evaluation.options", "finetune.serving.address",
              "finetune.early.answering", "finetune.early.merging", "finetune.early.training",
              "finetune.commands.records.watch",
              "finetune.commands.report"]  # fmt: skip


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['ft', '--help']\nfrom finetune.cli import main\n"
        "try:\n main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
