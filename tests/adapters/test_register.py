"""Importing finetune changes nothing for others; `finetune.register()` makes its PEFT types known to peft.

In processes of their own: in this one they are known already.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import train

OWN = ("BITFIT", "BOTTLENECK", "LAST_LAYERS")


def ran(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_changes_nothing() -> None:
    ran(f"""
import sys
before = list(sys.meta_path)
import finetune
assert sys.meta_path == before
assert not {{"torch", "peft", "transformers"}} & set(sys.modules)
import peft
assert not set({OWN}) & peft.PeftType.__members__.keys()
""")


@pytest.mark.parametrize("first", ["finetune", "peft"])
def test_registering_once_or_twice(first: str) -> None:
    ran(f"""
import {first}
import finetune
finetune.register()
import peft
members, mapping = list(peft.PeftType), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)
assert set({OWN}) <= {{kind.value for kind in members}}
finetune.register()
assert (list(peft.PeftType), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)) == (members, mapping)
""")


@pytest.mark.parametrize("method", ["bottleneck", "last_layers"])
def test_the_card_of_an_adapter_loads_it_with_plain_peft(recipe: Callable[..., Path], method: str) -> None:
    """The Python lines of its README.md, as they stand there."""
    path = recipe(model={"name": "tiny-llama"}, train={"max_steps": 1})
    folder = train(path, f"adapter.method={method}").adapter
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "finetune.register()" in code
    ran(f"{code}\nassert any('{method}_' in name for name, _ in model.named_parameters())", folder)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("finetune.register()", "")], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode, "or else it need not be called"
