"""Which model types take LoRA adapters in vLLM, read in its sources without importing them.

    pip download vllm --no-deps && unzip -q vllm-*.whl -d vllm
    python tools/vllm_models.py vllm

Prints MODELS and EMBEDDINGS of finetune/adapters/consumers.py.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

Class = tuple[list[str], list[str] | None]
"""(its bases, names in its own `embedding_modules`)"""


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def read(folder: Path) -> dict[tuple[str, str] | str, Class]:
    found: dict[tuple[str, str] | str, Class] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                embeddings = None
                for line in node.body:
                    value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
                    target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
                    if isinstance(value, ast.Dict) and getattr(target, "id", "") == "embedding_modules":
                        embeddings = [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
                own = [name_of(base) for base in node.bases], embeddings
                found[path.stem, node.name] = found[path.parent.name, node.name] = found[node.name] = own
    return found


def registered(registry: Path) -> dict[str, tuple[str, str]]:
    """Architecture -> (module, class)."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(registry.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                words = (
                    [v.value for v in value.elts if isinstance(v, ast.Constant)] if isinstance(value, ast.Tuple) else []
                )
                if isinstance(key, ast.Constant) and len(words) == 2:
                    found.setdefault(str(key.value), (str(words[0]).rpartition(".")[2], str(words[1])))
    return found


def main(unpacked: Path) -> None:
    folder = unpacked / "vllm" / "model_executor" / "models"
    classes, architectures = read(folder), registered(folder / "registry.py")

    def line(name: str, stem: str, seen: tuple[str, ...] = ()) -> list[Class]:
        """A class and all that it comes from, nearest first; SupportsLoRA stands for itself."""
        found = classes.get((stem, name)) or (classes.get(name) if seen else None)  # a base may be of another module
        if name == "SupportsLoRA":
            return [(["SupportsLoRA"], None)]
        if found is None or name in seen:
            return []
        return [found, *(one for base in found[0] for one in line(base, stem, (*seen, name)))]

    models, embeddings = [], []
    for model_type, named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        stem, name = architectures.get(named if isinstance(named, str) else named[0], ("", ""))
        family = line(name, stem)
        if any("SupportsLoRA" in bases for bases, _ in family):
            models.append(model_type)
            if next((own for _, own in family if own is not None), None):
                embeddings.append(model_type)
    for title, names in (("MODELS", models), ("EMBEDDINGS", embeddings)):
        print(f'{title} = """\n{textwrap.fill(" ".join(sorted(names)), 118, break_on_hyphens=False)}\n"""')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
