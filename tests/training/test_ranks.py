"""Several processes train as one does: real ones, on CPUs over gloo, each with rows of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ft, tensors, write_rows
from ranks_script import replies

from finetune.early import launching

SCRIPT = Path(__file__).parent / "ranks_script.py"
ROWS = 27  # 5 of them held out: steps of 8 rows, and a last one of 6, of which a process of four has none
DAILY, SLOW = (
    ("sft", "packed", "dpo", "ppo", "few"),
    ("smoothed", "full", "qlora", "simpo", "kto", "reward", "pretrain"),
)
DAILY_IN_PARTS, SLOW_IN_PARTS = ("sft", "packed", "dpo"), ("full", "qlora", "kto", "reward", "pretrain")
STAGES, IN_PARTS = (
    [*daily, *(pytest.param(stage, marks=pytest.mark.slow) for stage in slow)]
    for daily, slow in ((DAILY, SLOW), (DAILY_IN_PARTS, SLOW_IN_PARTS))
)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_machines", 1, "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", launching.free_port(), "--num_processes",
)  # fmt: skip


def launched(folder: Path, commands: Sequence[Sequence[str]], launcher: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """By process, what it saw in each command."""
    (folder / "commands.json").write_text(json.dumps(commands))
    processes = 2
    words = ["-m", *launcher, processes, SCRIPT, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, timeout=500
    )
    others = "".join(file.read_text() for file in folder.glob("said.*"))
    assert done.returncode == 0, done.stderr[-3000:] + others[-3000:]
    (folder / "said").write_text(done.stdout + done.stderr + others)
    return [json.loads((folder / f"seen.{rank}.json").read_text()) for rank in range(processes)]


def recipes(folder: Path, base: Path) -> dict[str, Path]:
    def words(i: int, times: int) -> str:
        return " ".join(str(i * 7 % 10 + j) for j in range(times))

    chats = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": words(i, 1 + i % 5)}]}
        for i in range(ROWS)
    ]
    asked = [[{"role": "user", "content": f"say {i}"}] for i in range(ROWS)]
    pairs = [
        {"messages": prompt, "chosen": words(i, 1 + i % 4), "rejected": words(i + 3, 2)}
        for i, prompt in enumerate(asked)
    ]
    labelled = [{"prompt": f"say {i}", "completion": words(i, 1 + i % 4), "label": i % 3 > 0} for i in range(ROWS)]
    even = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": words(i, 1)}]}
        for i in range(10, 34)
    ]
    texts = [{"text": f"{i} " + words(i, 30)} for i in range(ROWS)]
    rows = {
        name: str(write_rows(folder / f"{name}.jsonl", made))
        for name, made in (
            ("chats", chats),
            ("even", even),
            ("pairs", pairs),
            ("labelled", labelled),
            ("texts", texts),
            ("two", chats[:2]),
        )
    }
    rule = folder / "rule.py"
    rule.write_text("def length(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n")
    common = {
        "version": 1, "model": {"name": str(base), "dtype": "float32", "sanity_check": False},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    }  # fmt: skip
    train = {
        "num_train_epochs": 2, "effective_batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 0.01,
        "logging_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0.0,
    }  # fmt: skip
    data = {"max_length": 64, "eval_split": 5}
    made = {
        "sft": {"stage": "sft", "data": {"train": rows["chats"], **data}},
        "qlora": {"stage": "sft", "data": {"train": rows["chats"], **data}},
        "packed": {"stage": "sft", "data": {"train": rows["even"], "max_length": 80, "packing": True}},
        "few": {"stage": "sft", "data": {"train": rows["two"], "max_length": 64, "eval_split": 1}},
        "smoothed": {"stage": "sft", "data": {"train": rows["chats"], **data}},
        "dpo": {"stage": "dpo", "data": {"train": rows["pairs"], **data}},
        "simpo": {"stage": "dpo", "data": {"train": rows["pairs"], **data}, "dpo": {"loss_type": "simpo", "beta": 2.0}},
        "kto": {"stage": "kto", "data": {"train": rows["labelled"], **data}},
        "reward": {"stage": "reward", "data": {"train": rows["pairs"], **data}},
        "full": {
            "stage": "sft",
            "data": {"train": rows["chats"], "max_length": 64},
            "adapter": {"method": "full"},
            "eval": {"data": rows["chats"], "during": {"limit": 4, "metrics": ["exact_match"]}, "max_new_tokens": 4},
        },
        "ppo": {
            "stage": "ppo",
            "data": {"train": rows["chats"], "max_length": 64},
            "reward": {"functions": [f"{rule}:length"]},
            "ppo": {"max_new_tokens": 8, "num_mini_batches": 2},
        },
        "pretrain": {"stage": "pretrain", "data": {"train": rows["texts"], "max_length": 32, "eval_split": 5}},
    }
    written = {}
    for name, sections in made.items():
        more: dict[str, Any] = {"label_smoothing_factor": 0.1, "group_by_length": True} if name == "smoothed" else {}
        more |= {"per_device_train_batch_size": None} if name == "packed" else {}
        more |= {"learning_rate": 1e-3, "max_steps": 2} if name == "ppo" else {}
        more |= {"load_best_model_at_end": True} if name == "full" else {}  # the first: no answer is right
        more |= {"num_train_epochs": 40, "early_stopping_patience": 2, "learning_rate": 0.05} if name == "few" else {}
        section = {**train, **more}
        model = {**common["model"], **({"quantization": "int4"} if name == "qlora" else {})}
        written[name] = folder / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump({**common, **sections, "model": model, "train": section}))
    return written


def command(recipe: Path, output: Path, *more: str) -> list[str]:
    stage = yaml.safe_load(recipe.read_text())["stage"]
    return [stage, "--recipe", str(recipe), "--output", str(output), *more]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_alike(one: Path, several: Path, tolerance: float = 1e-5, norms: float = 0.0) -> None:
    """Every loss and every figure of both runs.

    norms: how far those of gradients may be apart beside, as a part of them.
    """
    alone, together = metrics(one), metrics(several)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for a, b in zip(alone, together, strict=True):
        losses = [key for key in ("loss", "value_loss", "eval_loss", "grad_norm", "reward_mean", "kl") if key in a]
        for key in losses:
            assert b[key] == pytest.approx(a[key], norms if key == "grad_norm" else 0.0, tolerance), (key, a)
        assert a.get("num_tokens") == b.get("num_tokens")
        held_out = {key: value for key, value in a.items() if key.startswith("eval_") and isinstance(value, float)}
        assert losses or held_out
        assert {key: b[key] for key in held_out} == pytest.approx(held_out, abs=1e-4)


Together = tuple[Path, dict[str, list[dict[str, Any]]]]


def trained(folder: Path, base: Path, stages: Sequence[str], in_parts: Sequence[str], daily: bool) -> Together:
    """A folder with each stage trained by one process and by two, and what the two saw."""
    written = recipes(folder, base)
    five, three = (("--set", f"train.max_steps={steps}") for steps in (5, 3))
    for name in stages:
        with replies(folder / "replies.json", recorded=False):
            done = ft(*command(written[name], folder / f"{name}.one"))
        assert done.returncode == 0, (name, done.stderr)
    commands = [["ddp", *command(written[name], folder / f"{name}.ddp")] for name in stages]
    commands += [["fsdp", *command(written[name], folder / f"{name}.fsdp")] for name in in_parts]
    for kind in ("ddp", "fsdp") if daily else ():
        assert ft(*command(written["sft"], folder / f"{kind}.from_one", *three)).returncode == 0
        commands.append([kind, *command(written["sft"], folder / f"{kind}.from_one", "--resume", *five)])
        commands.append([kind, *command(written["sft"], folder / f"{kind}.to_one", *three)])
    by_rank = launched(folder, commands, ACCELERATE if daily else TORCHRUN)
    seen = {Path(words[5]).name: [own[i] for own in by_rank] for i, words in enumerate(commands)}
    return folder, seen


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Together:
    return trained(tmp_path_factory.mktemp("ranks"), base, DAILY, DAILY_IN_PARTS, daily=True)


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Together:
    return trained(tmp_path_factory.mktemp("ranks"), base, SLOW, SLOW_IN_PARTS, daily=False)


def of(request: pytest.FixtureRequest, stage: str) -> Together:
    found: Together = request.getfixturevalue("together" if stage in DAILY else "rest")
    return found


def check_codes(together: Together, name: str) -> None:
    folder, seen = together
    assert [own["code"] for own in seen[name]] == [0, 0], (folder / "said").read_text()[-3000:]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(request: pytest.FixtureRequest, stage: str) -> None:
    together = of(request, stage)
    check_codes(together, f"{stage}.ddp")
    assert_alike(together[0] / f"{stage}.one", together[0] / f"{stage}.ddp")


@pytest.mark.parametrize("stage", IN_PARTS)
def test_weights_in_parts_are_one(request: pytest.FixtureRequest, stage: str) -> None:
    """Losses, the result's own weights, and answers while the run trains."""
    together = of(request, stage)
    check_codes(together, f"{stage}.fsdp")
    for own in together[1][f"{stage}.fsdp"]:
        assert max(own["shares"]) < 0.6
    one, parts = together[0] / f"{stage}.one", together[0] / f"{stage}.fsdp"
    best = json.loads((parts / "result.json").read_text())["best_checkpoint"]
    assert (best is not None and best.endswith("checkpoint-4")) is (stage == "full")
    assert_alike(one, parts)
    kept = "model" if (one / "model").is_dir() else "adapter"
    whole, found = tensors(one / kept), tensors(parts / kept)
    assert whole.keys() == found.keys()
    for name, value in whole.items():
        assert (value - found[name]).abs().max() < 1e-4, name


def test_early_stopping_stops_all(together: Together) -> None:
    """One row to train, one held out: a process has none of either."""
    for name in ("few.one", "few.ddp"):
        assert json.loads((together[0] / name / "result.json").read_text())["steps"] < 40


def test_the_first_alone_reads_the_weights(together: Together) -> None:
    """Where no reference needs all of them before they are shared out."""
    seen = together[1]
    for name, reads in {"sft.ddp": [True, True], "sft.fsdp": [True, False], "dpo.fsdp": [True, True]}.items():
        assert [own["reads"] > 0 for own in seen[name]] == reads, name


def test_each_has_rows_of_its_own(together: Together) -> None:
    """In an epoch no row is in both; the first alone reads the data."""
    folder, seen = together
    first, second = (set(own["rows"][: (ROWS - 5) // 2]) for own in seen["sft.ddp"])
    assert first | second == set(range(ROWS - 5))
    assert not first & second
    assert [own["loads"] > 0 for own in seen["sft.ddp"]] == [True, False]
    assert not (folder / "sft.ddp" / ".lock").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_number_of_processes_may_change(together: Together, kind: str) -> None:
    """Three steps by one and two more by two processes, and the other way round, are five steps of one."""
    folder, _ = together
    check_codes(together, f"{kind}.from_one")
    done = ft(*command(folder / "sft.yaml", folder / f"{kind}.to_one", "--resume", "--set", "train.max_steps=5"))
    assert done.returncode == 0, done.stderr
    whole = {row["step"]: row["loss"] for row in metrics(folder / "sft.one") if "loss" in row and row["step"] <= 5}
    for name in (f"{kind}.from_one", f"{kind}.to_one"):
        found = {row["step"]: row["loss"] for row in metrics(folder / name) if "loss" in row}
        assert found == pytest.approx(whole, abs=1e-5), name
