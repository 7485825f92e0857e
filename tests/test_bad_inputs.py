"""Some three hundred bad inputs, each with what is said of it: exit code 2, no traceback, no model loaded.

The table is fixtures/bad_inputs.txt; what its files hold stands in bad_inputs_kit.py. Lines before the heading `# late`
are run where torch and transformers cannot be imported at all; those behind it where loading a model is an error. Some
of every kind are run as processes of their own, too.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import bad_inputs_kit as kit
import pytest
from conftest import ft

EARLY, LATE = kit.cases()
ALONE = """
import atexit, sys
from finetune.cli import main

atexit.register(lambda: print("heavy", *(n for n in ("torch", "transformers") if n in sys.modules), flush=True))
main()
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bad") / "here"
    where.mkdir()
    kit.folder(where)
    return where


@pytest.fixture(scope="module")
def told(here: Path) -> dict[str, kit.Told]:
    before = sorted(str(path) for path in here.rglob("*"))
    found = kit.typed(here, [line for line, _ in EARLY])
    assert sorted(str(path) for path in here.rglob("*")) == before, "something was written"
    return found


@pytest.mark.parametrize(("line", "said"), EARLY, ids=[line for line, _ in EARLY])
def test_told_without_torch(told: dict[str, kit.Told], here: Path, line: str, said: str) -> None:
    code, heavy, text = told[line]
    assert kit.as_table(text, here) == said
    assert (code, heavy) == (2, [])


def test_there_are_enough_and_of_every_command() -> None:
    assert len(EARLY) + len(LATE) >= 300
    commands = {line.split()[0] for line, _ in EARLY if line}
    assert commands >= {
        "pretrain", "sft", "reward", "dpo", "kto", "ppo", "merge", "export", "eval", "generate", "compare", "chat",
        "serve", "data", "recipes", "models", "doctor", "plan", "runs", "report",
    }  # fmt: skip


ALONE_LINES = [EARLY[i] for i in range(0, len(EARLY), len(EARLY) // 5)]


@pytest.mark.parametrize(("line", "said"), ALONE_LINES, ids=[line for line, _ in ALONE_LINES])
def test_as_a_process(here: Path, line: str, said: str) -> None:
    done = kit.process(ALONE, here, *shlex.split(line))
    assert (done.returncode, kit.as_table(done.stderr, here)) == (2, said)
    assert done.stdout.splitlines()[-1] == "heavy"


@pytest.fixture(scope="module")
def with_models(here: Path) -> Path:
    kit.models(here)
    return here


def test_those_that_need_torch_are_these(with_models: Path) -> None:
    """One that is told before torch is there belongs above the heading `# late`, where that is a promise."""
    found = kit.typed(with_models, [line for line, _ in LATE])
    assert not [line for line, (_, heavy, _) in found.items() if not heavy]


@pytest.mark.parametrize(("line", "said"), LATE, ids=[line for line, _ in LATE])
def test_told_before_a_model_is_loaded(
    with_models: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    import transformers

    loaded = []
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: loaded.append(1))
    done = ft(*shlex.split(line), cwd=with_models)
    assert done.returncode == 2
    assert kit.as_table(done.stderr, with_models).endswith(said)
    assert not loaded
    assert "Traceback" not in done.stderr
    assert not (with_models / "pwned").exists()
