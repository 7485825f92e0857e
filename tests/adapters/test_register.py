"""Importing finetune changes nothing for others; `finetune.register()` makes its PEFT types known to peft.

In processes of their own: in this one they are known already. They are forked from one that has torch and transformers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import train

OWN = ("BITFIT", "BOTTLENECK", "LAST_LAYERS")
FORKS = """
import json, os, sys, traceback
import accelerate, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

for line in sys.stdin:
    code, cwd = json.loads(line)
    child = os.fork()
    if not child:
        try:
            os.chdir(cwd)
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            os._exit(1)
        os._exit(0)
    print("<end>", os.waitpid(child, 0)[1], flush=True)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ran() -> Iterator[Run]:
    """Runs Python code where peft and finetune are not imported yet."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        stdin, stdout = one.stdin, one.stdout
        assert stdin is not None
        assert stdout is not None

        def run(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
            print(json.dumps([code, str(cwd or ".")]), file=stdin, flush=True)
            said: list[str] = []
            while not (line := stdout.readline()).startswith("<end>"):
                assert line, said
                said.append(line)
            return subprocess.CompletedProcess(code, int(line.split()[1]), "".join(said))

        yield run
        stdin.close()


def test_importing_changes_nothing(ran: Run) -> None:
    code = """
import sys
before = list(sys.meta_path)
import finetune
assert sys.meta_path == before
assert not {"torch", "peft", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = ran(f"""
import sys
assert "peft" not in sys.modules
before = list(sys.meta_path)
import finetune
import peft
assert sys.meta_path == before
assert not set({OWN}) & peft.PeftType.__members__.keys()
""")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("first", ["finetune", "peft"])
def test_registering_once_or_twice(ran: Run, first: str) -> None:
    done = ran(f"""
import {first}
import finetune
finetune.register()
import peft
members, mapping = list(peft.PeftType), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)
assert set({OWN}) <= {{kind.value for kind in members}}
finetune.register()
assert (list(peft.PeftType), dict(peft.PEFT_TYPE_TO_TUNER_MAPPING)) == (members, mapping)
""")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("method", ["bottleneck", "last_layers"])
def test_the_card_of_an_adapter_loads_it_with_plain_peft(ran: Run, recipe: Callable[..., Path], method: str) -> None:
    """The Python lines of its README.md, as they stand there."""
    path = recipe(model={"name": "tiny-llama"}, train={"max_steps": 1})
    folder = train(path, f"adapter.method={method}").adapter
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "finetune.register()" in code
    done = ran(f"{code}\nassert any('{method}_' in name for name, _ in model.named_parameters())", folder)
    assert done.returncode == 0, done.stdout
    done = ran(code.replace("finetune.register()", ""), folder)
    assert done.returncode, "or else it need not be called"
    assert "Traceback" in done.stdout
