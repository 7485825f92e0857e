"""Some three hundred bad inputs, each with what is said of it: exit code 2, no traceback, no model loaded.

The table is fixtures/bad_inputs.txt; what its files hold stands in bad_inputs_kit.py. Lines before the heading `# late`
are run where torch and transformers cannot be imported at all; those behind it where loading a model is an error. Some
of every kind are run as processes of their own, too.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import bad_inputs_kit as kit
import pytest
from conftest import ft

import finetune

TABLE = Path(__file__).parent / "fixtures" / "bad_inputs.txt"
Case = tuple[str, str]


def cases() -> tuple[list[Case], list[Case]]:
    """(command line, what is said), of those that need no torch and of those that do."""
    found: tuple[list[Case], list[Case]] = ([], [])
    late = 0
    for block in TABLE.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("#"):
            late |= block.startswith("# late")
            continue
        line, _, said = block.strip("\n").partition("\n")
        found[late].append((line.removeprefix("$ ft").strip(), said))
    return found


EARLY, LATE = cases()
WITHOUT_TORCH = """
import json, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Refused())
from finetune.cli import main

for line in sys.stdin:
    sys.argv = ["ft", *json.loads(line)]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    print(f"<end {code}>", file=sys.stderr, flush=True)
"""
ALONE = """
import atexit, sys
from finetune.cli import main

atexit.register(lambda: print("heavy", *(n for n in ("torch", "transformers") if n in sys.modules), flush=True))
main()
"""
ENVIRONMENT = {"PYTHONPATH": str(Path(finetune.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def process(program: str, where: Path, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words], input=given, capture_output=True, text=True, cwd=where,
        env={**os.environ, **ENVIRONMENT}, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bad") / "here"
    where.mkdir()
    kit.folder(where)
    return where


@pytest.fixture(scope="module")
def told(here: Path) -> dict[str, tuple[str, str]]:
    """Command line -> (exit code, stderr), all in one process without torch."""
    before = sorted(str(path) for path in here.rglob("*"))
    asked = "".join(json.dumps(shlex.split(line)) + "\n" for line, _ in EARLY)
    done = process(WITHOUT_TORCH, here, given=asked)
    *texts, rest = done.stderr.split("<end ")
    assert len(texts) == len(EARLY), done.stderr[-3000:]
    assert sorted(str(path) for path in here.rglob("*")) == before, "something was written"
    codes = [text.partition(">\n")[0] for text in (*texts[1:], rest)]
    words = [texts[0], *(text.partition(">\n")[2] for text in texts[1:])]
    return {line: (c, text) for (line, _), c, text in zip(EARLY, codes, words, strict=True)}


def as_table(text: str, here: Path) -> str:
    """What differs between machines and installations left out."""
    for found, written in ((str(here), "HERE"), (", smollm2-135m", ""), ("\n\n", "\n")):
        text = text.replace(found, written)
    return text.rstrip("\n")


@pytest.mark.parametrize(("line", "said"), EARLY, ids=[line for line, _ in EARLY])
def test_told_without_torch(told: dict[str, tuple[str, str]], here: Path, line: str, said: str) -> None:
    code, text = told[line]
    assert as_table(text, here) == said
    assert code == "2"


def test_there_are_enough_and_of_every_command() -> None:
    assert len(EARLY) + len(LATE) >= 300
    commands = {line.split()[0] for line, _ in EARLY if line}
    assert commands >= {
        "pretrain", "sft", "reward", "dpo", "kto", "ppo", "merge", "export", "eval", "generate", "compare", "chat",
        "serve", "data", "recipes", "models", "doctor", "plan", "runs", "report",
    }  # fmt: skip


ALONE_LINES = [EARLY[i] for i in range(0, len(EARLY), len(EARLY) // 12)]


@pytest.mark.parametrize(("line", "said"), ALONE_LINES, ids=[line for line, _ in ALONE_LINES])
def test_as_a_process(here: Path, line: str, said: str) -> None:
    done = process(ALONE, here, *shlex.split(line))
    assert (done.returncode, as_table(done.stderr, here)) == (2, said)
    assert done.stdout.splitlines()[-1] == "heavy"


@pytest.fixture(scope="module")
def with_models(here: Path) -> Path:
    kit.models(here)
    return here


@pytest.mark.parametrize(("line", "said"), LATE, ids=[line for line, _ in LATE])
def test_told_before_a_model_is_loaded(
    with_models: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    import transformers

    loaded = []
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: loaded.append(1))
    done = ft(*shlex.split(line), cwd=with_models)
    assert done.returncode == 2
    assert as_table(done.stderr, with_models).endswith(said)
    assert not loaded
    assert "Traceback" not in done.stderr
    assert not (with_models / "pwned").exists()
