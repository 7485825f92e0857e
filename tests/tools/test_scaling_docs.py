"""The commands and files of docs/scaling.md are ones that ft, torchrun and their readers take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from finetune.cli.commands import app
from finetune.early import launching
from finetune.recipe.file import check

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
SHELL = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
YAML = [yaml.safe_load(block) for kind, block in BLOCKS if kind == "yaml"]


def commands() -> list[list[str]]:
    """The words of every `ft …` and `-m finetune …` in the page, variables taken for numbers."""
    lines = [*SHELL, *(line for page in YAML for line in str(page.get("run", "")).splitlines())]
    found = []
    for line in lines:
        for text in re.findall(r"(?:\bft|-m finetune) ((?:sft|dpo|ppo|plan|pretrain|kto|reward) [^'\n]+)", line):
            found.append(shlex.split(re.sub(r"\$\w+", "0", text)))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_ones_of_ft(words: list[str]) -> None:
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    given = command.make_context("ft", words[1:]).params
    if given.get("launch"):
        names = ("num_processes", "num_machines", "machine_rank", "main_address", "main_port", "zero", "offload")
        launch = launching.given(given["launch"], *(given[name] for name in names))
        assert launch is not None
        assert launch.words()[:4] == ["--launch", given["launch"], "--num-processes", str(given["num_processes"])]


def test_there_are_some() -> None:
    assert len(commands()) > 8


def test_other_launchers_are_asked_as_they_want() -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}
    asked = [shlex.split(line) for line in SHELL if line.startswith(("torchrun", "accelerate"))]
    assert {words[0] for words in asked} == parsers.keys()
    for name, *words in asked:
        given = parsers[name].parse_args(words[1:] if name == "accelerate" else words)
        assert given.module
        assert given.training_script == "finetune"


def test_files_of_clusters() -> None:
    job, sky, recipe = YAML
    assert check(recipe, "sft").stage == "sft"
    nodes = job["spec"]["pytorchReplicaSpecs"]
    assert nodes["Master"] == nodes["Worker"]
    words = nodes["Master"]["template"]["spec"]["containers"][0]["command"]
    assert words[:3] == ["torchrun", "-m", "finetune"]
    assert sky["num_nodes"] == 2


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_reads_its_configuration(stage: int, offload: bool) -> None:
    """By accelerate's reader, which needs no DeepSpeed; its kernels have not run."""
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    from finetune.training.sharded import deepspeed

    config = HfDeepSpeedConfig(deepspeed(stage, offload))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    assert config.is_offload() is offload


def test_fsdp_is_read_by_transformers_and_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2, and packed weights of int4 that pass for floating-point numbers."""
    import torch
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import TrainingArguments

    from finetune import ranks
    from finetune.models.quantization import config_for
    from finetune.recipe.sections import ModelConfig
    from finetune.training.sharded import fsdp

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **fsdp(offload=True))
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward
    assert "OffloadPolicy" in type(plugin.cpu_offload).__name__
    model = ModelConfig(name="m", quantization="int4")
    alone = config_for(model, torch.bfloat16)
    monkeypatch.setattr(ranks, "sharded", lambda: True)
    together = config_for(model, torch.bfloat16)
    assert alone is not None
    assert together is not None
    assert (alone.bnb_4bit_quant_storage, together.bnb_4bit_quant_storage) == (torch.uint8, torch.bfloat16)
