"""Small models made in memory, and the project's commands run as a user runs them."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from byte_tokenizer import CHATML, make_tokenizer

__all__ = ["CHATML", "make_tokenizer"]

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no bug
hypothesis.settings.load_profile("untimed")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FT_LANG"] = "en"  # whatever this machine speaks

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's "&": Ctrl-C would be ignored, and so by children
    signal.signal(signal.SIGINT, signal.default_int_handler)
SHARED = Path(__file__).parent.parent.parent / "shared"
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
"""A PNG of one pixel."""


imported = 0
"""Modules, when garbage was last put aside."""


@pytest.fixture(autouse=True)
def frozen() -> None:
    """What is imported stays: accelerate collects garbage at the end of every run, and need not look through it."""
    global imported
    if len(sys.modules) > imported + 300:
        imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def shorten(put: Callable[[Any, str, Any], None]) -> None:
    """Half the time of a short run: tiny models fit, without a pass to see how many rows do, and nothing is
    planned or drawn. put: setattr, or pytest's own."""
    if sizing := sys.modules.get("finetune.planning.sizing"):
        put(sizing, "skeleton", lambda model: None)
        put(sizing, "build", lambda recipe, skeleton: None)
        put(sizing.fits, "rows_that_fit", lambda network, recipe, length, machine, cap, start: cap)
    if plan := sys.modules.get("finetune.training.memory"):
        put(plan, "planned", lambda *_: None)
    if picture := sys.modules.get("finetune.report.picture"):
        put(picture, "plot", lambda rows, path, title="": picture.write_atomically(path, PIXEL))
    if figure := sys.modules.get("matplotlib.figure"):
        put(figure.Figure, "savefig", lambda self, file, **_: file.write(PIXEL))


@pytest.fixture(autouse=True)
def shortened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is marked `whole` has all of it, as users do; the others do not wait for the disk, either."""
    if not request.node.get_closest_marker("whole"):
        shorten(monkeypatch.setattr)
        monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a byte-level tokenizer, on disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "random-llama"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def adapter(base: Path, folder: Path, seed: int, r: int = 4, targets: Any = ("q_proj", "v_proj"), **more: Any) -> Path:
    """A LoRA adapter as plain peft writes it, with a scale of 2 (rsLoRA: 4 at r 4)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets), **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on tied embeddings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(folder, save_embedding_layers=False)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """64 short conversations."""
    return write_rows(
        tmp_path / "rows.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": f"{i} {i * 7 % 10}"},
                ]
            }
            for i in range(64)
        ],
    )


@pytest.fixture
def recipe(tmp_path: Path, base: Path, rows: Path) -> Callable[..., Path]:
    """Write a small SFT recipe; keyword arguments replace whole sections."""
    import yaml

    def write(**sections: Any) -> Path:
        values: dict[str, Any] = {
            "version": 1,
            "stage": "sft",
            "model": {"name": str(base), "dtype": "float32"},
            "data": {"train": str(rows), "max_length": 64},
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
            "train": {"max_steps": 4, "effective_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1},
            "output": {"dir": str(tmp_path / "run")},
        }
        for name, section in sections.items():
            values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def ft(*arguments: Any, cwd: Path | None = None, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `ft` in this process, as a user types it: a process of its own costs eight seconds of imports (`ft_process`).

    What it and its own children write is what the two streams got.
    """
    from finetune.cli import main
    from finetune.terminal import progress

    words, streams = ["ft", *map(str, arguments)], (sys.stdin, sys.stdout, sys.stderr)
    before, kept, code = Path.cwd(), [os.dup(1), os.dup(2)], 0
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, pytest.MonkeyPatch.context() as patch:
        for file, number in ((out, 1), (err, 2)):
            streams[number].flush()
            os.dup2(file.fileno(), number)
        patch.setattr(sys, "argv", words)
        patch.setattr(progress, "advising", True)
        patch.setenv("COLUMNS", "200")
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO((stdin or "").encode())), encoding="utf-8")  # type: ignore[arg-type]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        try:
            os.chdir(cwd or before)
            main()
        except SystemExit as ended:
            code = int(str(ended.code or 0))
        finally:
            os.chdir(before)
            for number, old in enumerate(kept, 1):
                (sys.stdout, sys.stderr)[number - 1].flush()
                os.dup2(old, number)
                os.close(old)
            sys.stdin, sys.stdout, sys.stderr = streams
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(words, code, *said)


def ft_process(
    *arguments: Any, cwd: Path | None = None, stdin: str | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, for `timeout` seconds at most."""
    return subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, input=stdin, timeout=timeout, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def train(recipe_path: Path, *overrides: str, resume: bool = False, overwrite: bool = False) -> Any:
    """Run an SFT recipe in this process; returns its Run."""
    from finetune.commands import sft
    from finetune.recipe.file import load
    from finetune.recipe.stages import SftRecipe
    from finetune.run.directory import Run

    loaded = load(str(recipe_path), SftRecipe, overrides)
    sft.run(loaded, resume=resume, overwrite=overwrite)
    return Run(Path(loaded.output.dir))


def tensors(folder: Path) -> dict[str, Any]:
    """All tensors of the safetensors files of a folder."""
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small BERT with one output, as many published reward models are."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(0)
    special, letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "abcdefghijklmnopqrstuvwxyz"
    words = [*special, *letters, *(f"##{c}" for c in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=48, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"
